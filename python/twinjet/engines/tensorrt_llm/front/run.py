"""One request on its way through the engine: submit, follow, convert, and always release."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from twinjet.engines.base import LogprobRow, Outlet, Run, StepRow
from twinjet.engines.tensorrt_llm.front.channel import FaultReported, Inbox, ReportChannel, ReportLost
from twinjet.engines.tensorrt_llm.front.handoff import Handoff, carried
from twinjet.engines.tensorrt_llm.front.outputs import OutputTracker, engine_row, report_row
from twinjet.engines.tensorrt_llm.front.processes import end_tasks
from twinjet.errors import RequestFailed, TwinjetError
from twinjet.request import EngineRequest

log = logging.getLogger(__name__)


_GOES_ON = ("length", "not_finished")
"""How a prefill ends whose output does not end with its first token."""
_PromptNews = tuple[int | None, Sequence[LogprobRow] | None]
"""Cached tokens, if the engine says, and the prompt's log probabilities, if asked for; see StepRow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """What runs share. submit: SamplingParams arguments to the engine's result object. explain: an engine's
    exception to ours. progressed: tells the watchdog that a step has come. seal: see handoff.Handoffs."""

    submit: Callable[[EngineRequest, dict[str, Any], Handoff | None], Any]
    seal: Callable[[EngineRequest, Mapping[str, Any], Sequence[LogprobRow]], bytes]
    explain: Callable[[Exception], Awaitable[TwinjetError]]
    progressed: Callable[[], None]
    channel: ReportChannel
    eos_token_ids: frozenset[int]
    batch: StepBatch
    counters: Counter[str]
    report_timeout_s: float


@dataclass(frozen=True, slots=True)
class Plan:
    """is_ours: our sampler draws. make_params: (output index, report key) to SamplingParams arguments."""

    is_ours: bool
    make_params: Callable[[int, int], dict[str, Any]]


class ResultError(Exception):
    """What newer versions write into a result's error field: a fault of that request alone."""


class StepBatch:
    """Gathers what a turn of the loop brings, so that all requests' tokens go into their pumps as one step."""

    def __init__(self) -> None:
        self._rows: dict[Outlet, list[StepRow]] = {}

    def add(self, outlet: Outlet, row: StepRow) -> None:
        if not self._rows:
            asyncio.get_running_loop().call_soon(self.flush)
        self._rows.setdefault(outlet, []).append(row)

    def flush(self) -> None:
        """Put what was gathered now."""
        rows, self._rows = self._rows, {}
        for outlet, of_it in rows.items():
            outlet.step(of_it)


class RequestRun:
    """Runs one request. make_plan: decides how; may take time and raise. sink: where its outputs go.

    handoff: what it goes on from, None if it begins here.
    """

    def __init__(
        self,
        context: RunContext,
        request: EngineRequest,
        make_plan: Callable[[EngineRequest], Awaitable[Plan]],
        sink: Run,
        handoff: Handoff | None = None,
    ) -> None:
        self._handoff = handoff
        self._first_tokens = () if handoff is None else handoff.first_tokens
        self._context = context
        self._request = request
        self._make_plan = make_plan
        self._sink = sink
        self._plan: Plan
        self._outputs = [
            OutputTracker(request, index, context.eos_token_ids) for index in range(request.sampling.n)
        ]
        self._prompt: _PromptNews | None = None
        self._is_prompt_told = False
        self._error: TwinjetError | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._by_output: dict[int, asyncio.Task[None]] = {}

    def start(self) -> None:
        """Begin; outputs and errors go to the sink."""
        name = f"tensorrt_llm {self._request.request_id}"
        self._tasks.append(asyncio.create_task(self._begin(), name=name))

    def fail(self, error: TwinjetError) -> None:
        """End the request with an error, after what came before it; the first one counts."""
        if self._error is not None:
            return
        self._error = error
        self._push()
        self._context.batch.flush()
        self._sink.fail(error)

    def stop_output(self, index: int) -> None:
        """Stop one output, which has ended for its reader, in the engine too."""
        if index in self._by_output:
            self._by_output[index].cancel()

    async def close(self) -> None:
        """Stop what still runs, in the engine too; returns when that is done."""
        await end_tasks(self._tasks)

    async def _begin(self) -> None:
        try:
            self._plan = await self._make_plan(self._request)
        except TwinjetError as error:
            self.fail(error)
        except Exception as error:  # noqa: BLE001 - the engine's errors are of many kinds; all become ours
            self.fail(await self._context.explain(error))
        else:
            if self._error is None:
                self._follow(0)

    def _push(self) -> None:
        """Give the sink what has come."""
        if self._prompt is None:
            return
        for output in self._outputs:
            if self._request.prefill_only and output.finish is None:
                continue
            news = output.take()
            if news is None:
                continue
            prompt = None if self._is_prompt_told else self._prompt
            self._is_prompt_told = True
            finish = news.finish
            self._context.batch.add(
                self._sink.outlet,
                (
                    self._sink.key + output.index,
                    news.token_ids,
                    None if finish is None else finish.reason,
                    None if finish is None else finish.stopped_by,
                    prompt,
                    news.logprobs or None,
                ),
            )

    def _follow(self, index: int) -> None:
        name = f"tensorrt_llm {self._request.request_id} output {index}"
        task = self._by_output[index] = asyncio.create_task(self._run_output(self._outputs[index]), name=name)
        self._tasks.append(task)

    async def _run_output(self, output: OutputTracker) -> None:
        channel = self._context.channel
        key, inbox = channel.open()
        result = None
        try:
            arguments = self._plan.make_params(output.index, key)
            result = self._context.submit(self._request, arguments, self._handoff)
            await self._read(result, output, inbox)
        except asyncio.CancelledError:
            raise
        except TwinjetError as error:
            self.fail(error)
        except Exception as error:  # noqa: BLE001 - the engine's errors are of many kinds; all become ours
            self.fail(await self._context.explain(error))
        finally:
            channel.close(key)
            self._context.counters["rank_disagreements"] += inbox.num_disagreements
            # Workers say what draws only where a GPU's row had to be copied to the CPU.
            self._context.counters["outputs_copied_to_cpu"] += inbox.target is not None
            if result is not None and not result.finished:
                _abort(result)
            self._push()

    async def _read(self, result: Any, output: OutputTracker, inbox: Inbox) -> None:
        async for _ in result:
            self._context.progressed()
            if getattr(result, "error", None):
                # Newer versions set it and may or may not raise as well.
                raise await self._context.explain(ResultError(result.error))
            await self._take_step(result, output, inbox)
            self._push()
            if output.finish is not None or result.finished:
                break
        completion = result.outputs[0]
        if self._request.prefill_only and output.finish is None and completion.finish_reason in _GOES_ON:
            self._hand_off(result, completion, output)
            return
        output.engine_ended(completion.finish_reason, completion.stop_reason)
        output.settle()

    def _hand_off(self, result: Any, completion: Any, output: OutputTracker) -> None:
        """Give what another engine needs to go on after the first token."""
        told = carried(completion.disaggregated_params) or carried(result.disaggregated_params)
        if told is None or self._prompt is None or told["first_gen_tokens"] != output.tokens:
            raise RequestFailed(
                "the engine does not say where the prompt's blocks are", reason="HANDOFF_LOST"
            )
        state = self._context.seal(self._request, told, output.logprobs)
        self._sink.hand_off(*self._prompt, state)

    async def _take_step(self, result: Any, output: OutputTracker, inbox: Inbox) -> None:
        """Copy what is new before the next step changes it."""
        completion = result.outputs[0]
        tokens = output.new_tokens(completion.token_ids)
        if not tokens:
            return
        first = output.num_tokens
        if self._first_tokens[first:] and tokens[: len(self._first_tokens)] != list(self._first_tokens):
            raise RequestFailed("the engine lost the token that was handed over", reason="HANDOFF_LOST")
        entries = list(completion.logprobs[first : first + len(tokens)]) if completion.logprobs else []
        if self._prompt is None:
            self._prompt = self._prompt_news(result, completion)
            for index in range(1, len(self._outputs)):
                # Only now, so that they find the prompt's blocks in the prefix cache.
                self._follow(index)
        counter = "tokens_twinjet" if self._plan.is_ours else "tokens_engine"
        for offset, token_id in enumerate(tokens):
            if output.finish is not None:
                return
            logprobs = await self._logprobs(token_id, first + offset, entries[offset : offset + 1], inbox)
            self._context.counters[counter] += 1
            output.feed(token_id, logprobs)
        if self._plan.is_ours:
            await self._confirm(output, tokens[-1], inbox)

    async def _logprobs(
        self, token_id: int, position: int, entry: list[Any], inbox: Inbox
    ) -> LogprobRow | None:
        wanted = self._request.sampling.logprobs
        if wanted is None:
            return None
        if self._handoff is not None and position < len(self._first_tokens):
            return self._handoff.logprobs[position]
        if self._plan.is_ours:
            return report_row(await self._report(token_id, position, inbox))
        if not entry:
            raise RequestFailed("the engine left out a token's logprob", reason="LOGPROBS_LOST")
        return engine_row(token_id, entry[0], wanted)

    async def _confirm(self, output: OutputTracker, last_token: int, inbox: Inbox) -> None:
        """Make sure that what ended the output was drawn, not forced by a fault of the sampler."""
        if inbox.fault is not None:
            self._context.counters["faults"] += 1
            raise RequestFailed("the sampler found no token to draw", reason="SAMPLER_FAULT")
        is_last = output.finish is not None or self._request.prefill_only
        is_reported = output.num_tokens > len(self._first_tokens)
        if not is_last or not is_reported or self._request.sampling.logprobs is not None:
            return
        await self._report(last_token, output.num_tokens - 1, inbox)

    async def _report(self, token_id: int, position: int, inbox: Inbox) -> Any:
        try:
            report = await inbox.take(position, self._context.report_timeout_s)
        except FaultReported as fault:
            self._context.counters["faults"] += 1
            log.error("request %s: %s", self._request.request_id, fault)
            raise RequestFailed("the sampler found no token to draw", reason="SAMPLER_FAULT") from None
        except ReportLost as lost:
            self._context.counters["reports_lost"] += 1
            log.error("request %s: %s", self._request.request_id, lost)
            raise RequestFailed("the sampler's report was lost", reason="REPORT_LOST") from None
        if report.token_id != token_id:
            self._context.counters["tokens_overridden"] += 1
            raise RequestFailed("the engine did not keep the drawn token", reason="SAMPLER_OVERRIDDEN")
        return report

    def _prompt_news(self, result: Any, completion: Any) -> _PromptNews:
        wanted = self._request.sampling.prompt_logprobs
        cached = getattr(result, "cached_tokens", None)
        if wanted is None:
            return cached, None
        prompt = self._request.prompt_token_ids
        entries = list(completion.prompt_logprobs or [])
        if len(entries) == len(prompt):
            # Number i is about token i + 1, so the last one is about the first output token.
            entries.pop()
        if len(entries) != len(prompt) - 1:
            raise RequestFailed(
                f"the engine gave {len(entries)} prompt logprobs for {len(prompt)} tokens",
                reason="LOGPROBS_LOST",
            )
        return cached, [
            engine_row(token_id, entry, wanted) for token_id, entry in zip(prompt[1:], entries, strict=True)
        ]


def _abort(result: Any) -> None:
    try:
        result.abort()
    except Exception as error:  # noqa: BLE001 - the executor may be gone, and then so is the request
        log.warning("cannot abort a request in the engine: %s", error)
