"""A device for the tests: rows in CPU memory that are drawn as if they were on a GPU."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from twinjet.engines.tensorrt_llm.worker import device_draw
from twinjet.sampling import Request, Sampler

WAIT_S = 20.0


class FakeDevice:
    """Work is done at once, but the host learns of it only while `arrived` is set."""

    def __init__(self) -> None:
        self.arrived = threading.Event()
        self.arrived.set()
        self.num_draws = 0
        self.failure: str | None = None
        self.late_failure: str | None = None

    # As CudaSampler.

    def prepare(self, requests: Sequence[Request], vocab_size: int, **_: Any) -> None:
        self._requests = requests

    def launch(self, logits: Any, outputs: Any, *, bitmask: Any, stream: int) -> None:
        if self.failure is not None:
            raise RuntimeError(self.failure)
        self.num_draws += 1
        num_logprobs = None if outputs.top_ids is None else outputs.top_ids.shape[-1] - 1
        result = Sampler(num_threads=1).sample(
            logits, self._requests, bitmask=bitmask, num_logprobs=num_logprobs, advance=False
        )
        outputs.token_ids[:] = torch.from_numpy(result.token_ids)
        outputs.status[:] = torch.from_numpy(result.status.view("int32"))
        if result.logprobs is not None:
            outputs.top_ids[:] = torch.from_numpy(result.logprobs.token_ids)
            outputs.top_logprobs[:] = torch.from_numpy(result.logprobs.logprobs)
            outputs.ranks[:] = torch.from_numpy(result.logprobs.ranks)

    # As torch.cuda.Event.

    def synchronize(self) -> None:
        assert self.arrived.wait(WAIT_S), "nobody let the device's work arrive"
        if self.late_failure is not None:
            raise RuntimeError(self.late_failure)


def fake_device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    """Let every row be drawn on a fake device."""
    device = FakeDevice()
    monkeypatch.setattr(device_draw, "can_draw", lambda row, num_logprobs: True)
    monkeypatch.setattr(device_draw, "_sampler", lambda index: device)
    monkeypatch.setattr(device_draw, "current_stream", lambda row: 0)
    monkeypatch.setattr(device_draw, "_pinned", lambda size: torch.empty(size, dtype=torch.int32))
    monkeypatch.setattr(device_draw, "_recorded_event", lambda where: device)
    return device
