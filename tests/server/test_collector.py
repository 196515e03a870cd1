"""When the garbage collector is told to leave a server's own objects alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from twinjet.server import main


def test_everything_is_frozen_when_another_deployment_serves_and_at_no_other_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []
    monkeypatch.setattr(
        main,
        "gc",
        SimpleNamespace(
            collect=lambda: done.append("collect"),
            freeze=lambda: done.append("freeze"),
            set_threshold=lambda *_: done.append("threshold"),
        ),
    )
    deployments = {name: SimpleNamespace(is_ready=False) for name in ("a", "b")}
    server = cast("Any", SimpleNamespace(deployments=SimpleNamespace(by_name=deployments)))

    collector = main._Collector()
    told = []
    for ready in ((), ("a",), ("a",), ("a", "b"), ("b",), ("a", "b")):
        done.clear()
        for name, deployment in deployments.items():
            deployment.is_ready = name in ready
        collector.changed(server)
        told.append(list(done))

    frozen = ["collect", "freeze"]
    assert told == [[], frozen, [], frozen, [], frozen]
