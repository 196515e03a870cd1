"""Phases of a start, with everything heavy replaced."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from twinjet.engines.base import LoadProgress
from twinjet.engines.vllm.front import startup
from twinjet.errors import ConfigError
from twinjet.models.eos import named_eos


async def test_a_phase_that_is_over_is_not_shown_while_the_next_one_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    imported = threading.Event()
    shown: list[LoadProgress] = []

    def find_model(model: str, report: Callable[[str, float], None]) -> str:
        report("the demo model is ready", 1.0)
        return model

    def report(progress: LoadProgress) -> None:
        shown.append(progress)
        if [p.phase for p in shown][-2:] == ["the demo model is ready", "importing vLLM"]:
            imported.set()

    def wait_ready() -> str:
        return "" if imported.wait(5) else "nobody said that vLLM is being imported"

    def launch(self: Any, context: Any) -> Any:
        raise ConfigError(f"forked: {self._forked}")

    monkeypatch.setattr(startup, "_find_model", find_model)
    monkeypatch.setattr(startup.prestart, "prestart", lambda: None)
    monkeypatch.setattr(startup.prestart, "wait_ready", wait_ready)
    monkeypatch.setattr(startup._Launcher, "launch", launch)
    plan = startup.Plan("demo", "demo", {}, native_sampler=False, native_block_manager=False)
    with pytest.raises(ConfigError, match="forked: True"):
        await startup.launch(plan, report)
    done = [progress.done for progress in shown]
    assert done == sorted(done)


@pytest.mark.parametrize(
    ("config", "special", "expected"),
    [
        ('{"eos_token": "</s>"}', "{}", 7),
        ('{"eos_token": {"content": "word"}}', '{"eos_token": "</s>"}', 3),
        ("{}", '{"eos_token": "</s>"}', 7),
        ('{"eos_token": "unknown"}', "{}", None),
        ("{}", "{}", None),
    ],
)
def test_the_named_end_token(tmp_path: Path, config: str, special: str, expected: int | None) -> None:
    (tmp_path / "tokenizer_config.json").write_text(config)
    (tmp_path / "special_tokens_map.json").write_text(special)
    assert named_eos(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text(
        '{"added_tokens": [{"id": 7, "content": "</s>"}], "model": {"vocab": {"word": 3}}}'
    )
    assert named_eos(tmp_path) == expected
