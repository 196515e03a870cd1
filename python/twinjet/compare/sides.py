"""The sides that a command line names: a model that runs, or an arm of an earlier run."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from twinjet.client import AsyncClient, NotFound, Tokens, TwinjetClientError
from twinjet.compare.analysis import Settings, phase_drift
from twinjet.compare.driver import Target
from twinjet.compare.effective import PROBE, effective_settings
from twinjet.compare.plan import Plan
from twinjet.compare.recorded import RecordedSide
from twinjet.compare.records import Arm, RunData, read_run
from twinjet.compare.targets import ClientTarget, connect, parse_side
from twinjet.errors import ConfigError

RECORDED = "recorded:"
_MUST_BE_SAME = ("digest", "load", "requests_per_leg", "seed", "answers", "json_schema")


class LiveSide:
    """A model of a server. settings() must be awaited before anything else is asked."""

    recorded: RecordedSide | None = None
    header: Mapping[str, Any] = {}

    def __init__(self, name: str, client: AsyncClient, model: str) -> None:
        self.target: Target = ClientTarget(name, client, model)
        self.has_logprobs = False
        self._client = client
        self._model = model

    async def settings(self) -> Mapping[str, str]:
        """Give the effective settings. Raises ConfigError for a model that is not known or not ready."""
        try:
            model = await self._client.get_model(self._model)
        except NotFound as error:
            raise ConfigError(str(error)) from error
        self.has_logprobs = "logprobs" in model.capabilities
        if model.state != "ready":
            return effective_settings(model, ())
        return effective_settings(model, (await self._tokenize(PROBE)).token_ids)

    async def _tokenize(self, text: str) -> Tokens:
        try:
            return await self._client.tokenize(text, model=self._model)
        except TwinjetClientError as error:
            raise ConfigError(
                f"{self.target.name} cannot tokenize, so the tokenizers cannot be compared: {error}"
            ) from error

    def header_of(self, plan: Plan, header: Mapping[str, Any]) -> Mapping[str, Any]:
        """Give what this side adds to the header; nothing."""
        return {}


class PastSide:
    """An arm of an earlier run."""

    def __init__(self, path: Path, data: RunData, arm: Arm) -> None:
        self.recorded: RecordedSide | None = RecordedSide.of(data, arm)
        self.header = data.header
        self.has_logprobs = any(record.chances for record in data.records)
        self.target: Target = _NeverRun(str(path))
        self._path = path
        self._data = data
        self._arm = arm

    async def settings(self) -> Mapping[str, str]:
        """Give the effective settings that were recorded."""
        settings: Mapping[str, str] = self.header["settings"][0 if self._arm == "a" else 1]
        return settings

    def header_of(self, plan: Plan, header: Mapping[str, Any]) -> Mapping[str, Any]:
        """Give what the new run's header says of the record. Raises ConfigError if the requests were others."""
        changed = [name for name in _MUST_BE_SAME if _as_read(header[name]) != self.header.get(name)]
        if changed:
            raise ConfigError(f"{self._path} recorded another run: {', '.join(changed)} differ")
        return {
            "recorded": f"{self._path}:{self._arm}",
            "recorded_at": self.header.get("started_at", ""),
            "recorded_drift": phase_drift(self._data, Settings(metric=plan.metric)),
        }


Side = LiveSide | PastSide


class _NeverRun:
    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, item: Any, sampling: Any, cache_salt: str) -> Any:
        raise AssertionError("a recorded side is read, not run")


def _as_read(value: Any) -> Any:
    return json.loads(json.dumps(value))


@asynccontextmanager
async def open_side(text: str, default_address: str) -> AsyncIterator[Side]:
    """Open what a command line names: MODEL, HOST:PORT/MODEL, or recorded:FOLDER with ":a" or ":b" behind it.

    Raises ConfigError.
    """
    if text.startswith(RECORDED):
        yield _open_record(text.removeprefix(RECORDED))
        return
    address, model = parse_side(text, default_address)
    async with connect(address, os.environ.get("TWINJET_TOKEN", "")) as client:
        yield LiveSide(text, client, model)


def _open_record(text: str) -> PastSide:
    name, colon, arm = text.rpartition(":")
    if not colon or arm not in ("a", "b"):
        name, arm = text, "b"
    path = Path(name)
    data = read_run(path / "run.jsonl" if path.is_dir() else path)
    side = PastSide(path, data, "a" if arm == "a" else "b")
    assert side.recorded is not None
    if not side.recorded.num_blocks("main"):
        raise ConfigError(f"{path} holds no whole block of {arm.upper()}")
    return side
