"""The V2 runner's sampler with look-alikes of the runner's parts: what can be tried without a GPU."""

import sys
from types import ModuleType
from types import SimpleNamespace as Made
from typing import Any

import numpy as np
import pytest

from tests.engines.vllm.support import native_params
from twinjet.engines.vllm.fields import NO_TOKEN
from twinjet.sampling import Request, Sampler

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("default")]

VOCAB = 64


class Stock:
    """Stands for vLLM's V2 sampler: counts calls, draws nothing."""

    logprobs_mode = "raw_logprobs"

    def __init__(self) -> None:
        import torch

        self.calls = 0
        self.added: list[int] = []
        self.req_states = Made(
            prompt_len=Made(np=np.full(4, 3)), prefill_len=Made(np=np.full(4, 3), gpu=None),
            all_token_ids=Made(gpu=torch.arange(40).view(4, 10)),
        )  # fmt: skip

    def add_request(self, index: int, params: Any) -> None:
        self.added.append(index)

    def get_logprobs_dims(self, indices: Any) -> None:
        return None

    def __call__(self, logits: Any, batch: Any) -> str:
        self.calls += 1
        return "stock"


def batch(slots: list[int], seq_lens: list[int]) -> Made:
    import torch

    return Made(
        idx_mapping_np=np.array(slots), idx_mapping=None, num_reqs=len(slots), cu_num_logits=None,
        seq_lens=torch.tensor(seq_lens), seq_lens_cpu_upper_bound=torch.tensor(seq_lens),
        prefill_len_np=np.full(len(slots), 3), req_ids=[f"r{slot}" for slot in slots],
    )  # fmt: skip


@pytest.fixture
def wrapped(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A NativeSamplerV2; vLLM's V2 modules, which need Triton, are stood in for."""
    inputs, output = ModuleType("input_batch"), ModuleType("output")
    inputs.get_num_sampled_and_rejected = lambda *parts: (parts[0], None)  # type: ignore[attr-defined]
    output.SamplerOutput = Made  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.gpu.input_batch", inputs)
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.gpu.sample.output", output)
    from twinjet.engines.vllm.core.sampler_v2 import NativeSamplerV2

    return NativeSamplerV2(Stock(), VOCAB)


def logits(rows: int) -> Any:
    import torch

    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(3))


def test_it_draws_what_the_native_sampler_draws(wrapped: Any) -> None:
    import torch

    wrapped.add_request(1, native_params())
    made = wrapped(logits(1), batch([1], [3]))
    alone = Request(VOCAB, temperature=1.0, seed=5, prompt_token_ids=[10, 11, 12])
    expected = Sampler(1).sample(logits(1), [alone]).token_ids
    assert made.sampled_token_ids.dtype == torch.int64
    assert made.sampled_token_ids.tolist() == [[int(expected[0])]]
    second = wrapped(logits(1), batch([1], [4])).sampled_token_ids[0, 0]
    assert int(second) == int(Sampler(1).sample(logits(1), [alone]).token_ids[0])
    assert wrapped.stock.calls == 0


def test_what_the_device_cannot_draw_goes_to_vllms_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    from twinjet import _core
    from twinjet.engines.vllm.core import sampler

    drawing = sampler.Drawing(VOCAB, "raw_logprobs")
    on_gpu: Any = Made(device=Made(type="cuda"), is_cuda=True)
    monkeypatch.setattr(sampler, "has_cuda", lambda: False)
    assert drawing.reason(on_gpu, None) == "device"
    monkeypatch.setattr(sampler, "has_cuda", lambda: True)
    monkeypatch.setattr(_core, "CUDA_MAX_LOGPROBS", 128, raising=False)
    assert drawing.reason(on_gpu, 128) == ""
    assert drawing.reason(on_gpu, 129) == "more_logprobs_than_on_cuda"
    assert drawing.reason(logits(1), 129) == ""


def test_an_unfinished_prefill_does_not_advance(wrapped: Any) -> None:
    wrapped.add_request(1, native_params())
    thrown = wrapped(logits(1), batch([1], [2])).sampled_token_ids
    kept = wrapped(logits(1), batch([1], [3])).sampled_token_ids
    assert thrown.tolist() == kept.tolist()


def test_a_foreign_request_takes_the_batch_to_vllms_sampler(wrapped: Any) -> None:
    wrapped.add_request(0, native_params())
    wrapped.add_request(1, native_params(extra_args=None))
    assert wrapped(logits(2), batch([0, 1], [3, 3])) == "stock"
    assert wrapped(logits(1), batch([0], [4])) == "stock"
    assert wrapped.drawing.counters["stock_steps.foreign_request"] == 2
    assert wrapped(logits(4), batch([0, 1], [3, 3])) == "stock"
    wrapped.add_request(0, native_params())
    assert wrapped(logits(1), batch([0], [3])) != "stock"


def test_a_row_without_a_token_is_marked_on_the_host(wrapped: Any) -> None:
    from twinjet.engines.vllm.core.sampler_v2 import marked_output

    wrapped.add_request(0, native_params(allowed_token_ids=[]))
    wrapped.add_request(1, native_params())
    made = wrapped(logits(2), batch([0, 1], [3, 3]))
    assert (made.sampled_token_ids >= 0).all()
    failed = wrapped.take_failed()
    assert failed == ["r0"]
    assert wrapped.take_failed() == []
    output = Made(sampled_token_ids=[[0], [9]], req_id_to_index={"r0": 0, "r1": 1})
    marked = marked_output(Made(get_output=lambda: output), failed).get_output()
    assert marked.sampled_token_ids == [[NO_TOKEN], [9]]


def test_the_hook_leaves_models_with_their_own_sampler_alone() -> None:
    from twinjet.engines.vllm.core.sampler_v2 import NativeSamplerV2, hook_custom_sampler

    def made(theirs: Any, speculative: Any) -> Any:
        runner = Made(init_model_state=lambda config, *rest: Made(custom_sampler=lambda sampler: theirs))
        hook_custom_sampler(runner, VOCAB)
        return runner.init_model_state(Made(speculative_config=speculative), 1, 2).custom_sampler(Stock())

    ours = made(None, None)
    assert isinstance(ours[0], NativeSamplerV2)
    assert ours[1] is None
    assert made(("s", "r"), None) == ("s", "r")
    assert made(None, object()) is None
