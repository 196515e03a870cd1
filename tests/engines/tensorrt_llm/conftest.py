"""Fixtures of the TensorRT-LLM tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.engines.factories import double_installed
from twinjet.engines.tensorrt_llm.front.channel import ReportChannel


@pytest.fixture(params=["1.2", "1.3"])
def version(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both recorded versions of the stand-in, installed one after the other."""
    with double_installed(request.param):
        yield request.param


@pytest.fixture
def double() -> Iterator[None]:
    """The stand-in of 1.2, the version that pip gives."""
    with double_installed("1.2"):
        yield


@pytest.fixture
async def channel() -> AsyncIterator[ReportChannel]:
    """The server's end of the reports."""
    started = ReportChannel()
    await started.start()
    yield started
    await started.stop()
