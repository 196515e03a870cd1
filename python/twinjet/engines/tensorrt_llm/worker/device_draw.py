"""Draws one row on the GPU that its logits are on, and does not wait for it.

The draw, the copy of its result to pinned memory and whatever the caller starts next follow one another on
the engine's current stream. The host reads the result later, when the device has long gone on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from twinjet import _core
from twinjet.sampling import Logprobs, SampleResult
from twinjet.sampling.cuda import CudaSampler, current_stream, has_cuda, unpack

if TYPE_CHECKING:
    from twinjet.sampling import Request

TARGET = "cuda"
_DTYPES = ("torch.float32", "torch.float16", "torch.bfloat16")
# Rows on their way at once: two steps of 256 requests. Above it a call waits for the device.
_NUM_SLOTS = 512
_FIRST_EDITS = 256


def can_draw(row: Any, num_logprobs: int | None) -> bool:
    """Say whether a row is drawn on its own device; if not, it is copied to the CPU."""
    return bool(
        row.is_cuda
        and has_cuda()
        and str(row.dtype) in _DTYPES
        and (num_logprobs is None or num_logprobs <= _core.CUDA_MAX_LOGPROBS)
    )


@dataclass(frozen=True, slots=True)
class DeviceDraw:
    """A draw under way.

    token_id: int32 [1] on the device, -1 if no token is admissible. It must be used on the stream that was
    current at the draw.
    """

    token_id: Any
    _host: Any
    _copied: Any
    _num_logprobs: int | None

    def result(self) -> SampleResult:
        """Wait for the device and give what was drawn, as Sampler.sample; any thread. Raises RuntimeError."""
        self._copied.synchronize()
        tokens, status, tops = unpack(self._host.numpy(), 1, self._num_logprobs)
        return SampleResult(tokens, status, None if tops is None else Logprobs(*tops))


def draw(
    row: Any, request: Request, mask: npt.NDArray[np.int32] | None, num_logprobs: int | None
) -> DeviceDraw:
    """Start the draw of one row, a torch tensor [vocab_size] for which can_draw holds.

    The request is not advanced: append the token before the next draw. mask: int32 [1, words], as
    Sampler.sample takes it; it may change after the call. Raises RuntimeError if a CUDA call fails.
    """
    outputs = CudaSampler.allocate(row, num_logprobs)
    device_mask = bitmask_rows = None
    if mask is not None:
        staged = _pinned(mask.size)
        staged.numpy()[:] = mask.reshape(-1)
        device_mask = staged.to(row.device, non_blocking=True).view(1, -1)
        bitmask_rows = np.zeros(1, np.int32)
    stream = current_stream(row)
    sampler = _sampler(int(row.device.index or 0))
    sampler.prepare([request], int(row.shape[0]), bitmask_rows=bitmask_rows, stream=stream)
    sampler.launch(row, outputs, bitmask=device_mask, stream=stream)
    assert outputs.packed is not None
    host = _pinned(outputs.packed.numel())
    host.copy_(outputs.packed, non_blocking=True)
    return DeviceDraw(outputs.token_ids, host, _recorded_event(row.device), num_logprobs)


def force(logits: Any, token_id: Any, otherwise: int) -> None:
    """Leave only the drawn token admissible, without waiting; `otherwise` where none was drawn.

    logits: the engine's tensor, changed in place. token_id: DeviceDraw.token_id.
    """
    import torch

    logits.fill_(-torch.inf)
    index = torch.where(token_id < 0, otherwise, token_id).to(torch.int64)
    logits.view(-1).index_fill_(0, index, 0.0)


@cache
def _sampler(device: int) -> CudaSampler:
    sampler = CudaSampler(device, _NUM_SLOTS)
    # Pinned memory is slow to get, so not row by row in the first steps.
    sampler.reserve(1, 1, _FIRST_EDITS)
    return sampler


def _pinned(size: int) -> Any:
    import torch

    return torch.empty(size, dtype=torch.int32, pin_memory=True)


def _recorded_event(device: Any) -> Any:
    import torch

    # Blocking: the thread that waits must not spin on a core that the engine needs.
    event = torch.cuda.Event(blocking=True)
    event.record(torch.cuda.current_stream(device))
    return event
