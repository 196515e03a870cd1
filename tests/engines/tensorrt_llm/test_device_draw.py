"""The logits processor on a device: which rows, no wait, and faults; a GPU itself is tests/gpu's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.engines.tensorrt_llm.fake_device import FakeDevice, fake_device
from tests.engines.tensorrt_llm.test_draw_processor import (
    PROMPT,
    VOCAB,
    drive,
    expected,
    settings,
)
from twinjet import _core
from twinjet.engines.fixed_logits import fixed_logits
from twinjet.engines.tensorrt_llm.front.channel import FaultReported, ReportChannel
from twinjet.engines.tensorrt_llm.worker import device_draw
from twinjet.engines.tensorrt_llm.worker.logits import DrawProcessor

END = 256


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    return fake_device(monkeypatch)


@pytest.mark.parametrize(
    ("dtype", "num_logprobs", "has_cuda", "is_cuda", "is_drawn"),
    [
        (torch.float32, None, True, True, True),
        (torch.bfloat16, 128, True, True, True),
        (torch.float16, 129, True, True, False),
        (torch.float64, None, True, True, False),
        (torch.float32, None, False, True, False),
        (torch.float32, None, True, False, False),
    ],
)
def test_rows_that_the_device_can_draw(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    num_logprobs: int | None,
    has_cuda: bool,
    is_cuda: bool,
    is_drawn: bool,
) -> None:
    monkeypatch.setattr(device_draw, "has_cuda", lambda: has_cuda)
    monkeypatch.setattr(_core, "CUDA_MAX_LOGPROBS", 128, raising=False)
    row = SimpleNamespace(is_cuda=is_cuda, dtype=dtype)
    assert device_draw.can_draw(row, num_logprobs) is is_drawn


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("padding", [0, 6])
@pytest.mark.parametrize("num_logprobs", [None, 3])
async def test_draws_the_tokens_of_the_cpu(
    channel: ReportChannel, device: FakeDevice, lag: int, padding: int, num_logprobs: int | None
) -> None:
    key, inbox = channel.open()
    processor = DrawProcessor(settings(channel, key, num_logprobs=num_logprobs, max_tokens=16))
    assert drive(processor, 16, lag=lag, padding=padding) == expected(16)
    assert device.num_draws == 16
    assert (await inbox.take(15, 5.0)).token_id == expected(16)[15]
    if num_logprobs is not None:
        on_cpu_key, on_cpu = channel.open()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(device_draw, "can_draw", lambda row, num: False)
            drive(DrawProcessor(settings(channel, on_cpu_key, num_logprobs=3)), 15, lag=lag)
        for position in range(15):
            assert await inbox.take(position, 5.0) == await on_cpu.take(position, 5.0)


async def test_a_call_does_not_wait_for_the_device(channel: ReportChannel, device: FakeDevice) -> None:
    key, inbox = channel.open()
    processor = DrawProcessor(settings(channel, key, max_tokens=1))
    device.arrived.clear()
    drawn = drive(processor, 1, lag=1)
    assert drawn == expected(1), "the token is forced although the host does not know it yet"
    assert not inbox._reports
    device.arrived.set()
    assert (await inbox.take(0, 5.0)).token_id == drawn[0], "reported without another call"


async def test_a_row_without_a_token_forces_the_end_and_is_a_fault(
    channel: ReportChannel, device: FakeDevice
) -> None:
    key, inbox = channel.open()
    processor = DrawProcessor(settings(channel, key))
    logits = torch.full((1, 1, VOCAB), -torch.inf)
    processor(0, logits, [PROMPT], None, None)
    assert int(logits.argmax()) == END
    with pytest.raises(FaultReported, match="no token is admissible"):
        await inbox.take(0, 5.0)


async def test_a_launch_that_fails_is_a_fault(channel: ReportChannel, device: FakeDevice) -> None:
    key, inbox = channel.open()
    device.failure = "LaunchSample: out of resources"
    logits = torch.zeros(1, 1, VOCAB)
    DrawProcessor(settings(channel, key))(0, logits, [PROMPT], None, None)
    assert int(logits.argmax()) == END
    with pytest.raises(FaultReported, match="out of resources"):
        await inbox.take(0, 5.0)


async def test_a_device_that_fails_later_is_a_fault_of_the_request(
    channel: ReportChannel, device: FakeDevice
) -> None:
    key, inbox = channel.open()
    processor = DrawProcessor(settings(channel, key))
    device.late_failure = "an illegal memory access was encountered"
    drive(processor, 1, lag=1)
    with pytest.raises(FaultReported, match="illegal memory access"):
        await inbox.take(0, 5.0)
    logits = torch.zeros(1, 1, VOCAB)
    processor(0, logits, [PROMPT], None, None)
    assert int(logits.argmax()) == END, "and from then on the end is forced"


class BrokenTensor(torch.Tensor):
    """Refuses every change, as all tensors do on a device that is gone."""

    def fill_(self, *_: Any) -> Any:
        raise RuntimeError("CUDA error: device-side assert triggered")


async def test_no_exception_leaves_it_when_nothing_can_be_forced(
    channel: ReportChannel, device: FakeDevice
) -> None:
    key, inbox = channel.open()
    logits = torch.zeros(1, 1, VOCAB).as_subclass(BrokenTensor)
    DrawProcessor(settings(channel, key))(0, logits, [PROMPT], None, None)
    with pytest.raises(FaultReported, match="device-side assert"):
        await inbox.take(0, 5.0)


class TensorOnGpu(torch.Tensor):
    """Says that it is on a GPU."""

    is_cuda = True


async def test_a_row_that_is_copied_to_the_cpu_is_told(channel: ReportChannel) -> None:
    key, inbox = channel.open()
    logits = torch.from_numpy(fixed_logits(PROMPT, VOCAB)).view(1, 1, VOCAB).as_subclass(TensorOnGpu)
    DrawProcessor(settings(channel, key))(0, logits, [PROMPT], None, None)
    assert int(logits.argmax()) == expected(1)[0]
    await inbox.take(0, 5.0)
    assert inbox.target in _core.sampler_cpu_targets()
