"""The doctor's live trial: an engine is started, and each thing that versions do differently is looked at.

What start-up has found out already (sampler, salt) is taken from there; the rest is tried here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from twinjet.engines.base import Component, OutputEvent, PromptEvent
from twinjet.engines.tensorrt_llm.front.processes import end_tasks, in_daemon_thread
from twinjet.engines.tensorrt_llm.front.trials import Finding, Setting
from twinjet.engines.tensorrt_llm.report import Line
from twinjet.errors import RequestAborted
from twinjet.request import EngineRequest, SamplingOverrides, resolve_sampling

if TYPE_CHECKING:
    from twinjet.engines.tensorrt_llm.front.engine import TrtLlmEngine

_NUM_TOKENS = 12
_LONG_OUTPUT = 2048
_STATS_S = 0.4
_ABORT_S = 10.0
_EVENTS_S = 5.0

# The recorded behaviours that make an own sampler's setting one that is not honoured.
_RECORDED: dict[Setting, tuple[str, ...]] = {
    "logit_bias": (),
    "bad_words": ("bad_words_ignored",),
    "min_tokens": ("min_tokens_counts_prompt",),
    "penalties": ("penalties_ignored",),
    "logprobs": ("logprobs_top_only",),
    "prompt_logprobs": ("prompt_logprobs_top_only", "context_rows_miscounted"),
    "seed": ("seed_ignored",),
    "cache_salt": ("salt_ignored",),
}


class Examination:
    """Tries one engine, which it starts. behaviours: the contract's; version: the recorded one to compare with."""

    def __init__(
        self, engine: TrtLlmEngine, behaviours: Mapping[str, Mapping[str, Any]], version: str
    ) -> None:
        self._engine = engine
        self._behaviours = behaviours
        self._version = version
        self._num_requests = 0

    async def run(self) -> list[Line]:
        """Give a line for each thing tried. Raises TwinjetError if the engine does not start."""
        began = time.monotonic()
        await self._engine.start(lambda progress: None)
        lines = [Line("start", "as recorded", f"ready after {time.monotonic() - began:.1f} s")]
        lines += [self._hook(), self._kv_manager()]
        checks: list[tuple[str, Callable[[], Awaitable[Line]]]] = [
            ("prompt", self._prompt), ("stop", self._stop), ("logprobs", self._logprobs), ("seed", self._seed),
            ("prefix cache", self._prefix_cache), ("end tokens", self._end_tokens),
            ("prompt_logprobs beside the hook", self._rows), ("abort", self._abort),
            ("statistics", self._statistics), ("KV cache size", self._capacity), ("KV events", self._events),
        ]  # fmt: skip
        for name, check in checks:
            try:
                lines.append(await check())
            except Exception as error:  # noqa: BLE001 - a check that cannot be done is a finding
                lines.append(Line(name, "fails", f"{type(error).__name__}: {error}"))
        return [*lines, *await self._settings()]

    # ---- what the package's own parts are ----

    def _hook(self) -> Line:
        sampler: Component = self._engine.describe().sampler
        if sampler.implementation == "twinjet":
            return Line("logits processor", "as recorded", f"Twinjet's sampler draws, on {sampler.target}")
        return Line("logits processor", "differs", sampler.reason, "the engine's own sampler draws")

    def _kv_manager(self) -> Line:
        handle = self._engine.parts.handle
        manager = handle.kv_arg("use_kv_cache_manager_v2", None)
        kind = "has no choice of managers" if manager is None else f"use_kv_cache_manager_v2 is {manager!r}"
        sampler = handle.arg("sampler_type", "not a setting")
        policy = handle.settings.policy
        return Line("settings", "as recorded", f"{kind}, sampler_type {sampler}, policy {policy}")

    # ---- requests as a client makes them ----

    async def _prompt(self) -> Line:
        once, again = await self._tokens(temperature=0.0), await self._tokens(temperature=0.0)
        if len(once) != _NUM_TOKENS:
            return Line("prompt", "fails", f"{len(once)} tokens came where {_NUM_TOKENS} were asked for")
        if once != again:
            return Line("prompt", "differs", "a greedy request gave other tokens the second time", "nothing")
        return Line("prompt", "as recorded", f"{_NUM_TOKENS} tokens, the same twice")

    async def _stop(self) -> Line:
        whole = await self._tokens(temperature=0.0)
        stop = whole[_NUM_TOKENS // 2]
        cut = await self._tokens(temperature=0.0, stop_token_ids=(stop,))
        expected = whole[: whole.index(stop) + 1]
        if cut != expected:
            return Line(
                "stop", "fails", f"{len(cut)} tokens came where the stop token was number {len(expected)}"
            )
        return Line("stop", "as recorded", "a stop token ended the output")

    async def _logprobs(self) -> Line:
        if "logprobs" not in self._engine.describe().capabilities:
            return Line("logprobs", "not tried", "refused here")
        events = await self._events_of(logprobs=2)
        outputs = [event for event in events if isinstance(event, OutputEvent)]
        tokens = [token for event in outputs for token in event.token_ids]
        chosen = [entry.chosen.token_id for event in outputs for entry in event.logprobs]
        if tokens != chosen:
            return Line("logprobs", "fails", f"{len(chosen)} logprobs came for {len(tokens)} tokens")
        return Line("logprobs", "as recorded", "one for each token")

    async def _seed(self) -> Line:
        if "seed" not in self._engine.describe().capabilities:
            return Line("seed", "not tried", "not claimed here")
        once, again = await self._tokens(seed=5), await self._tokens(seed=5)
        if once != again:
            return Line("seed", "fails", "the same seed gave other tokens")
        return Line("seed", "as recorded", "the same seed gave the same tokens")

    async def _prefix_cache(self) -> Line:
        if "prefix_cache" not in self._engine.describe().capabilities:
            return Line("prefix cache", "not tried", "refused here")
        handle = self._engine.parts.handle
        size = int(handle.kv_arg("tokens_per_block", 32))
        prompt = tuple(i % 50 + 10 for i in range(3 * size + 1))

        async def cached(salt: str) -> int | None:
            events = await self._events_of(prompt=prompt, cache_salt=salt, max_tokens=1)
            return next(event.num_cached_tokens for event in events if isinstance(event, PromptEvent))

        await cached("doctor-a")
        again, other = await cached("doctor-a"), await cached("doctor-b")
        seen = f"{again} tokens found again, {other} under another salt"
        if other:
            return Line("prefix cache", "fails", seen)
        if not again:
            return Line("prefix cache", "differs", seen, "nothing; prompts are not cached in whole blocks")
        return Line("prefix cache", "as recorded", seen)

    async def _abort(self) -> Line:
        request = self._request(max_tokens=_LONG_OUTPUT, ignore_eos=True)
        began = None
        try:
            async with asyncio.timeout(_ABORT_S):
                async for event in self._engine.generate(request):
                    if isinstance(event, OutputEvent) and began is None:
                        began = time.monotonic()
                        await self._engine.abort(request.request_id)
        except RequestAborted:
            took = time.monotonic() - (began or time.monotonic())
            tokens = await self._tokens(temperature=0.0)
            if len(tokens) == _NUM_TOKENS:
                return Line(
                    "abort", "as recorded", f"ended after {took * 1e3:.0f} ms, and the next request is well"
                )
            return Line("abort", "fails", "the next request got too few tokens")
        return Line("abort", "fails", "the output went on to its end")

    # ---- what no request shows ----

    async def _end_tokens(self) -> Line:
        """Look whether a submission without end_id adds stop tokens although it is to ignore them."""
        parts = self._engine.parts
        tokens = parts.model.tokens
        if len(tokens.eos_token_ids) < 2:
            return Line("end tokens", "not tried", "the model has one only")
        params = parts.handle.package.sampling_params(
            max_tokens=1, temperature=1.0, top_k=1, ignore_eos=True, detokenize=False
        )
        result = parts.handle.llm.generate_async(
            {"prompt_token_ids": [tokens.first_eos_token_id]}, sampling_params=params
        )
        await asyncio.wait_for(result.aresult(), parts.timeout_s)
        adds = bool(params.stop_token_ids)
        seen = "are added to what ignores them" if adds else "are left out where they are to be ignored"
        return self._compare(
            "end tokens", "setup_adds_eos", adds, seen, "always gives end_id, so none are added"
        )

    async def _rows(self) -> Line:
        """Let a request ask for prompt_logprobs beside a logits processor's."""
        parts = self._engine.parts
        name = "prompt_logprobs beside the hook"
        if not parts.drawing.is_ours:
            return Line(name, "not tried", "the hook is not in use")
        tokens = parts.model.tokens
        greedy = {
            "temperature": 1.0, "top_k": 1, "max_tokens": 1, "detokenize": False, "prompt_logprobs": 1,
            "end_id": tokens.first_eos_token_id, "pad_id": tokens.first_eos_token_id,
        }  # fmt: skip
        asking = parts.submit(greedy, [tokens.first_eos_token_id] * 8, {"streaming": False})
        wrong = await parts.self_test.sampler()
        await asyncio.wait_for(asking.aresult(), parts.timeout_s)
        seen = "the processor's tokens were lost" if wrong else "the processor's tokens were kept"
        return self._compare(
            name,
            "prompt_logprobs_shift_rows",
            bool(wrong),
            seen,
            "refuses prompt_logprobs with its own sampler",
        )

    async def _statistics(self) -> Line:
        parts = self._engine.parts
        if not parts.stats.num_rows:
            return Line("statistics", "differs", "no row came", "load and the cache's size are not known")
        blocks = False
        for _ in range(2):
            # The second time nothing is left that could be given at once.
            began = time.monotonic()
            await in_daemon_thread(
                lambda: parts.handle.llm.get_stats_async(timeout=_STATS_S), "doctor statistics"
            )
            blocks = time.monotonic() - began > _STATS_S / 2
        seen = f"{parts.stats.num_rows} rows; opening the iterator " + (
            "waits" if blocks else "does not wait"
        )
        return self._compare("statistics", "iterators_block", blocks, seen, "opens it in a thread")

    async def _capacity(self) -> Line:
        parts = self._engine.parts
        asked = await parts.handle.kv_capacity(parts.timeout_s)
        if asked is None:
            known = self._engine.describe().kv_cache
            seen = "not known" if known is None else f"{known.num_blocks} blocks of {known.block_size} tokens"
            return Line("KV cache size", "as recorded", f"{seen}, by statistics or settings")
        return Line(
            "KV cache size",
            "as recorded",
            f"{asked.num_blocks} blocks of {asked.block_size} tokens, asked for",
        )

    async def _events(self) -> Line:
        fan = self._engine.parts.kv_events
        if not self._engine.parts.handle.has_kv_events:
            return Line("KV events", "not tried", "not in use")
        async with aclosing(fan.journal.watch(fan.journal.epoch, fan.journal.sequence + 1)) as events:
            batch = asyncio.ensure_future(anext(events))
            await asyncio.sleep(0)
            size = int(self._engine.parts.handle.kv_arg("tokens_per_block", 32))
            await self._events_of(prompt=tuple(i % 40 + 12 for i in range(3 * size + 1)), max_tokens=1)
            await asyncio.wait({batch}, timeout=_EVENTS_S)
            await end_tasks([batch])
        if not fan.hash_kinds:
            return Line("KV events", "differs", "none came", "WatchKvEvents stays silent")
        seen = (
            f"hashes are {' and '.join(sorted(fan.hash_kinds))}, {len(fan.windows)} attention windows, "
            f"{len(fan.ranks)} ranks"
        )
        return self._compare(
            "KV events", "string_hashes", "strings" in fan.hash_kinds, seen, "takes both kinds of hashes"
        )

    async def _settings(self) -> Sequence[Line]:
        """Compare what the engine's own sampler and cache honour with what is recorded."""
        trials = self._engine.make_trials()
        handle = self._engine.parts.handle
        found = dict(await trials.sampler(has_logprobs=not handle.is_prebuilt))
        found["bad_words"] = await trials.bad_words()
        if handle.has_block_reuse and handle.features.has_cache_salt:
            found["cache_salt"] = await trials.cache_salt()
        return [self._setting(finding) for finding in found.values()]

    def _setting(self, finding: Finding) -> Line:
        recorded = not any(self._behaviours[name][self._version] for name in _RECORDED[finding.setting])
        name = f"own sampler: {finding.setting}" if finding.setting != "cache_salt" else "cache_salt"
        does = "is offered" if finding.is_honoured else "is refused where the engine's own sampler draws"
        if finding.setting == "cache_salt" and not finding.is_honoured:
            does = "is refused, and so is ResetPrefixCache"
        if finding.is_honoured == recorded:
            return Line(name, "as recorded", finding.seen, does)
        was = "honoured" if recorded else "not honoured"
        return Line(name, "differs", f"{finding.seen}; recorded: {was}", does)

    # ---- help ----

    def _compare(self, name: str, behaviour: str, is_so: bool, seen: str, does: str) -> Line:
        recorded = bool(self._behaviours[behaviour][self._version])
        if is_so == recorded:
            return Line(name, "as recorded", seen, f"Twinjet {does}" if is_so else "")
        return Line(name, "differs", f"{seen}; recorded: the opposite", f"Twinjet {does}")

    def _request(
        self, *, prompt: tuple[int, ...] | None = None, cache_salt: str = "", **sampling: Any
    ) -> EngineRequest:
        self._num_requests += 1
        tokens = self._engine.parts.model.tokens
        ids = prompt or (tokens.first_eos_token_id, *range(10, 20))
        overrides: dict[str, Any] = {"max_tokens": _NUM_TOKENS, "ignore_eos": True} | sampling
        seed = overrides.pop("seed", 1)
        resolved = resolve_sampling(
            SamplingOverrides(**overrides), self._engine.describe(), num_prompt_tokens=len(ids), seed=seed
        )
        return EngineRequest(
            request_id=f"doctor-{self._num_requests}",
            prompt_token_ids=ids,
            sampling=resolved,
            cache_salt=cache_salt,
        )

    async def _events_of(self, **request: Any) -> list[Any]:
        async with asyncio.timeout(self._engine.parts.timeout_s):
            return [event async for event in self._engine.generate(self._request(**request))]

    async def _tokens(self, **request: Any) -> list[int]:
        events = await self._events_of(**request)
        return [token for event in events if isinstance(event, OutputEvent) for token in event.token_ids]
