"""Where logits are drawn is decided by their device alone; what needs a GPU is in tests/gpu."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import twinjet
from twinjet.sampling import Request, Sampler, cuda


class OnCuda:
    """Logits that claim to live on CUDA device 3."""

    shape = (1, 8)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 3


def test_device_is_read_through_dlpack() -> None:
    assert cuda.device_of(OnCuda()) == 3
    assert cuda.device_of(np.zeros((1, 8), np.float32)) is None
    assert cuda.device_of([1.0]) is None


def test_cuda_logits_never_reach_the_cpu_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "has_cuda", lambda: False)
    with pytest.raises(RuntimeError, match="no CUDA side"):
        Sampler().sample(OnCuda(), [Request(8)])


def test_cuda_half_refuses_what_the_cpu_half_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "CudaSampler", lambda device: device)
    with pytest.raises(ValueError, match="requests has length 2"):
        Sampler().sample(OnCuda(), [Request(8), Request(8)])
    with pytest.raises(ValueError, match="advance"):
        Sampler().sample(OnCuda(), [Request(8)], advance=np.ones(3, np.bool_))
    with pytest.raises(ValueError, match="without a bitmask"):
        Sampler().sample(OnCuda(), [Request(8)], bitmask_rows=np.zeros(1, np.int32))


@pytest.mark.parametrize("num_logprobs", [None, 0, 3])
def test_outputs_share_a_buffer_that_one_copy_brings_back(num_logprobs: int | None) -> None:
    torch = pytest.importorskip("torch")
    made = cuda.CudaSampler.allocate(torch.zeros(2, 8), num_logprobs)
    assert made.packed is not None
    parts = [made.token_ids, made.status]
    if num_logprobs is not None:
        parts += [made.top_ids, made.top_logprobs, made.ranks]
    for number, part in enumerate(parts):
        part.copy_(torch.arange(part.numel()).reshape(part.shape) + 100 * number)
    assert made.packed.numel() == sum(part.numel() for part in parts)
    tokens, status, tops = cuda.unpack(made.packed.numpy(), 2, num_logprobs)
    found = [tokens, status.view(np.int32), *(tops or ())]
    assert [part.tolist() for part in found] == [part.tolist() for part in parts]


def test_import_needs_no_gpu_library() -> None:
    code = "import sys, twinjet.sampling; assert 'torch' not in sys.modules and 'cupy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    source = Path(twinjet.__file__).parent / "sampling" / "cuda.py"
    imports = {
        alias.name
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert not imports & {"torch", "cupy"}
