"""Copies of requests to another deployment: their answers are recorded, never returned, and dropped first under load.

A copy is made of the request that the primary got, runs as a tenant of its own at the lowest priority, and has no part in the
primary's stream: the primary's path only starts a task, or not.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinjet.engines.base import OutputEvent
from twinjet.errors import TwinjetError
from twinjet.request import EngineRequest

if TYPE_CHECKING:
    from twinjet.scheduler import Dispatcher

logger = logging.getLogger("twinjet.mirror")

TENANT = "twinjet-mirror"
PRIORITY = -100


class RecordFiles:
    """Lines of JSON in files that are followed by another at max_bytes; the oldest beyond max_files is deleted."""

    def __init__(self, folder: Path, max_bytes: int, max_files: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._max_bytes = max_bytes
        self._max_files = max_files
        numbers = [int(p.stem.rpartition("-")[2]) for p in self._paths()]
        self._number = max(numbers, default=0) + 1
        self._size = 0

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record. Blocks for the write."""
        line = json.dumps(record, ensure_ascii=False) + "\n"
        size = len(line.encode())
        if self._size and self._size + size > self._max_bytes:
            self._number += 1
            self._size = 0
        with (self._folder / f"mirror-{self._number:08d}.jsonl").open("a", encoding="utf-8") as file:
            file.write(line)
        self._size += size
        for path in self._paths()[: -self._max_files]:
            path.unlink(missing_ok=True)

    def _paths(self) -> list[Path]:
        return sorted(p for p in self._folder.glob("mirror-*.jsonl") if p.stem.rpartition("-")[2].isdecimal())


class Mirror:
    """Runs copies. max_streams: at once; more are dropped. counts: "copied", "dropped", "failed" since the start."""

    def __init__(
        self, max_streams: int, files: RecordFiles | None = None, *, record_prompts: bool = False
    ) -> None:
        self._max_streams = max_streams
        self._files = files
        self._record_prompts = record_prompts
        self._tasks: set[asyncio.Task[None]] = set()
        self._writing = asyncio.Lock()
        self.counts: Counter[str] = Counter()

    def copy(self, request: EngineRequest, model: str, name: str, dispatcher: Dispatcher) -> bool:
        """Start a copy at a deployment, or drop it: where copies are many or the deployment has a queue."""
        if len(self._tasks) >= self._max_streams or dispatcher.totals().waiting:
            self.counts["dropped"] += 1
            return False
        copied = replace(
            request,
            request_id=f"{request.request_id}-mirror",
            priority=PRIORITY,
            deadline=request.deadline,
            tenant=TENANT,
        )
        task = asyncio.create_task(self._run(copied, model, name, dispatcher), name="mirror")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.counts["copied"] += 1
        return True

    async def stop(self) -> None:
        """End what runs."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, request: EngineRequest, model: str, name: str, dispatcher: Dispatcher) -> None:
        began, first_at = time.monotonic(), None
        tokens: dict[int, list[int]] = {}
        texts: dict[int, list[str]] = {}
        reasons: dict[int, str] = {}
        failure = ""
        try:
            async with contextlib.aclosing(dispatcher.run(request)) as events:
                async for event in events:
                    if isinstance(event, OutputEvent):
                        first_at = first_at or time.monotonic()
                        tokens.setdefault(event.output_index, []).extend(event.token_ids)
                        texts.setdefault(event.output_index, []).append(event.text)
                        if event.finish is not None:
                            reasons[event.output_index] = event.finish.reason
        except TwinjetError as error:
            self.counts["failed"] += 1
            failure = f"{type(error).__name__}: {error}"
        if self._files is None:
            return
        record = self._record(request, model, name, tokens, texts, reasons, failure)
        record["seconds"] = round(time.monotonic() - began, 6)
        record["first_token_s"] = None if first_at is None else round(first_at - began, 6)
        async with self._writing:
            try:
                await asyncio.to_thread(self._files.write, record)
            except OSError as error:
                logger.warning("a mirrored answer could not be recorded: %s", error)

    def _record(
        self,
        request: EngineRequest,
        model: str,
        name: str,
        tokens: Mapping[int, list[int]],
        texts: Mapping[int, list[str]],
        reasons: Mapping[int, str],
        failure: str,
    ) -> dict[str, Any]:
        prompt = request.prompt_token_ids
        record: dict[str, Any] = {
            "time": time.time(),
            "request_id": request.request_id.removesuffix("-mirror"),
            "model": model,
            "deployment": name,
            "seed": request.sampling.seed,
            "prompt_tokens": len(prompt),
            "prompt_sha256": hashlib.sha256(json.dumps(prompt).encode()).hexdigest(),
            "error": failure,
            "outputs": [
                {
                    "output_index": index,
                    "tokens": len(tokens[index]),
                    "tokens_sha256": hashlib.sha256(json.dumps(tokens[index]).encode()).hexdigest(),
                    "reason": reasons.get(index, ""),
                }
                for index in sorted(tokens)
            ],
        }
        if self._record_prompts:
            record["prompt_token_ids"] = list(prompt)
            for output in record["outputs"]:
                output["token_ids"] = tokens[output["output_index"]]
                output["text"] = "".join(texts[output["output_index"]])
        return record
