"""Waits before a retry, which end early once the server's health says that the model is served again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import grpc

from twinjet.client._retry import Pause

_WATCH = "/grpc.health.v1.Health/Watch"
_SERVING = b"\x08\x01"
_MAX_NAME_BYTES = 127


def wait(
    channel: grpc.Channel,
    model: str,
    pause: Pause,
    begin: Callable[[Callable[[], Any]], Any] = lambda call: call(),
    sleep: Callable[[float], object] = time.sleep,
) -> None:
    """Wait for a pause. model: whose health counts, "" is the whole server's.

    begin: begins the call that asks for it. sleep: waits some seconds, or less if the wait is to end; so it does once
    that call is cancelled.
    """
    over_at = time.monotonic() + pause.at_most_s
    sleep(pause.at_least_s)
    if not pause.may_end_early:
        return
    watch = begin(lambda: _watch(channel, model, over_at - time.monotonic()))
    try:
        if any(update == _SERVING for update in watch):
            return
    except grpc.RpcError:
        pass  # The watch ran out of time, or this is no server that tells its health.
    finally:
        watch.cancel()
    sleep(max(0.0, over_at - time.monotonic()))


async def wait_aio(channel: grpc.aio.Channel, model: str, pause: Pause) -> None:
    """Wait for a pause, on an event loop; see wait."""
    over_at = time.monotonic() + pause.at_most_s
    await asyncio.sleep(pause.at_least_s)
    if not pause.may_end_early:
        return
    watch = _watch(channel, model, over_at - time.monotonic())
    try:
        async for update in watch:
            if update == _SERVING:
                return
    except grpc.RpcError:
        pass  # The watch ran out of time, or this is no server that tells its health.
    finally:
        watch.cancel()
    await asyncio.sleep(max(0.0, over_at - time.monotonic()))


def _watch(channel: Any, model: str, timeout_s: float) -> Any:
    # Request and response have one field each: written and read as bytes, the client needs no further package.
    name = model.encode()
    request = bytes((0x0A, len(name))) + name if 0 < len(name) <= _MAX_NAME_BYTES else b""
    # wait_for_ready: a server that is away answers once the channel has found it again.
    return channel.unary_stream(_WATCH)(request, timeout=max(0.0, timeout_s), wait_for_ready=True)
