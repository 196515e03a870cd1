"""AdminService.Compare: two deployments of this server, driven in its own process without a socket between."""

from __future__ import annotations

import asyncio
import itertools
import math
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING

from twinjet.client import Model
from twinjet.compare import analysis
from twinjet.compare.driver import Arrived, Progress
from twinjet.compare.effective import PROBE, check_equal, effective_settings
from twinjet.compare.plan import LADDER_BLOCKS, SELF_TEST_BLOCKS, Plan, default_metric
from twinjet.compare.records import Journal, Phase, RunData, TokenChances
from twinjet.compare.report import Report, as_html, make_report
from twinjet.compare.statistics import Interval, Precision
from twinjet.compare.workload import Load, WorkItem, Workload, synthetic
from twinjet.engines.base import Engine, EngineInfo, OutputEvent, Tokenizer
from twinjet.errors import (
    ConfigError,
    InvalidRequest,
    NotFound,
    PreconditionFailed,
    Unavailable,
    Unsupported,
    Violation,
)
from twinjet.request import EngineRequest, SamplingOverrides, resolve_sampling
from twinjet.server import convert
from twinjet.server.encoding import INLINE_CHARS, tokens_at_least
from twinjet.v1 import compare_pb2 as pb
from twinjet.v1 import model_pb2, sampling_pb2

if TYPE_CHECKING:
    import grpc
    from google.protobuf.duration_pb2 import Duration

    from twinjet.server.deployments import Deployment, Deployments

    Context = grpc.aio.ServicerContext[object, object]

TENANT = "twinjet-compare"
MAX_REQUESTS = 4096
MAX_RATE = 10_000.0
MAX_BLOCKS = 1000
MAX_RUNGS = 16
MAX_OUTPUT_TOKENS = 2**24
"""Of a whole comparison: times and ids of all are kept in memory, some 70 bytes a token."""
MAX_PROMPT_TOKENS = 2**22
"""Of all synthetic prompts together; longer ones are fewer and come again sooner."""
MAX_PAGE_BYTES = 3 * 2**20
_RESERVED = ("seed", "n", "max_tokens", "stop", "stop_token_ids", "logprobs", "prompt_logprobs", "constraint")
_PHASES: Mapping[Phase, pb.ComparePhase.ValueType] = {
    "sameness": pb.COMPARE_PHASE_ANSWERS,
    "self": pb.COMPARE_PHASE_SELF,
    "main": pb.COMPARE_PHASE_MAIN,
    "ladder": pb.COMPARE_PHASE_LADDER,
}
_OUTCOMES = {
    "a_faster": pb.COMPARE_OUTCOME_A_FASTER,
    "b_faster": pb.COMPARE_OUTCOME_B_FASTER,
    "no_difference": pb.COMPARE_OUTCOME_NO_DIFFERENCE,
    "not_comparable": pb.COMPARE_OUTCOME_NOT_COMPARABLE,
}


Ready = tuple[Engine, EngineInfo]


class DeploymentTarget:
    """A deployment as a side of a comparison: requests go into its queue as any other tenant's do."""

    def __init__(self, name: str, deployment: Deployment) -> None:
        self.name = name
        self._deployment = deployment
        self._prefix = f"compare-{secrets.token_hex(6)}-{name}"
        self._numbers = itertools.count()

    async def run(
        self, item: WorkItem, sampling: SamplingOverrides, cache_salt: str
    ) -> AsyncGenerator[Arrived, None]:
        """See driver.Target."""
        engine, info = self._deployment.ready()
        ids = item.prompt if isinstance(item.prompt, tuple) else await _encode(engine.tokenizer, item.prompt)
        request = EngineRequest(
            request_id=f"{self._prefix}-{next(self._numbers)}",
            prompt_token_ids=ids,
            sampling=resolve_sampling(sampling, info, num_prompt_tokens=len(ids), seed=item.seed),
            tenant=TENANT,
            cache_salt=cache_salt,
        )
        yield Arrived(deployment=self._deployment.name, num_prompt_tokens=len(ids))
        async with aclosing(self._deployment.dispatcher.run(request)) as events:
            async for event in events:
                if isinstance(event, OutputEvent):
                    chances = [
                        TokenChances(t.chosen.logprob, tuple((r.token_id, r.logprob) for r in t.top))
                        for t in event.logprobs
                    ]
                    reason = "" if event.finish is None else event.finish.reason
                    yield Arrived(event.token_ids, reason, text=event.text, chances=chances)


async def _encode(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Tokenize, a long text on a thread: other streams go on meanwhile."""
    encode = partial(tokenizer.encode, text, add_special_tokens=True)
    return tuple(encode() if len(text) <= INLINE_CHARS else await asyncio.to_thread(encode))


class Comparisons:
    """The comparisons of one server; see proto AdminService."""

    def __init__(self, deployments: Deployments) -> None:
        self._deployments = deployments
        self._is_comparing = False

    async def compare(self, request: pb.CompareRequest, context: Context) -> None:
        """Run one and write how it goes, its report last.

        Raises InvalidRequest, NotFound, PreconditionFailed.
        """
        sides = self._side("deployment_a", request), self._side("deployment_b", request)
        ready = [side.ready() for side in sides]
        if self._is_comparing:
            raise PreconditionFailed("a comparison is running; one at a time", reason="COMPARISON_RUNNING")
        self._is_comparing = True
        try:
            # Some million random tokens, or megabytes of text to be tokenized, take seconds.
            plan, slo = await asyncio.to_thread(_plan, request, ready)
            await self._compare(request, plan, slo, sides, context)
        finally:
            self._is_comparing = False

    def _side(self, field: str, request: pb.CompareRequest) -> Deployment:
        name = getattr(request, field)
        if not name:
            raise InvalidRequest.of(field, "is empty; name a deployment")
        if name not in self._deployments.by_name:
            raise NotFound(
                "deployment", name, f"this server has {', '.join(sorted(self._deployments.by_name))}"
            )
        return self._deployments.by_name[name]

    async def _compare(
        self,
        request: pb.CompareRequest,
        plan: Plan,
        slo: analysis.Slo,
        sides: tuple[Deployment, Deployment],
        context: Context,
    ) -> None:
        settings = [_settings(side) for side in sides]
        try:
            check_equal(settings[0], settings[1], request.allow)
        except ConfigError as error:
            raise PreconditionFailed(str(error), reason="UNEQUAL_SETTINGS") from None
        names = [side.name for side in sides]
        if names[0] == names[1]:
            names[1] += " (again)"
        # The client is this very process, whose time goes into everything it serves.
        header = await asyncio.to_thread(plan.header, names, settings)
        data = RunData(header | {"in_process": True})
        has_logprobs = all("logprobs" in side.ready()[1].capabilities for side in sides)
        targets = [DeploymentTarget(arm, side) for arm, side in zip("ab", sides, strict=True)]
        running = plan.driver(targets[0], targets[1], data, Journal(None), has_logprobs=has_logprobs)
        events: asyncio.Queue[pb.CompareResponse | None] = asyncio.Queue()

        def report(progress: Progress) -> None:
            if self._deployments.is_draining:
                raise Unavailable("the server is draining", reason="DRAINING", retry_after_s=1)
            events.put_nowait(pb.CompareResponse(progress=_progress(progress)))

        async def run() -> None:
            await plan.run(running)
            events.put_nowait(None)

        running.report = report
        started = pb.CompareStarted(digest=header["digest"], settings_a=settings[0], settings_b=settings[1])
        await context.write(pb.CompareResponse(started=started))
        async with asyncio.TaskGroup() as group:
            group.create_task(run(), name="compare")
            while (event := await events.get()) is not None:
                await context.write(event)
        found = await asyncio.to_thread(_report, data, plan, slo)
        await context.write(pb.CompareResponse(report=found))


def _settings(deployment: Deployment) -> Mapping[str, str]:
    engine, info = deployment.ready()
    return effective_settings(
        _model(deployment, info), engine.tokenizer.encode(PROBE, add_special_tokens=True)
    )


def _model(deployment: Deployment, info: EngineInfo) -> Model:
    model = model_pb2.Model(
        name=deployment.name, deployment=deployment.name, state=model_pb2.MODEL_STATE_READY
    )
    convert.fill_engine_info(model, info)
    return Model.of(model)


def _plan(request: pb.CompareRequest, ready: Sequence[Ready]) -> tuple[Plan, analysis.Slo]:
    """Check a request and make the plan, and the limits that its goodput counts by. Blocks for up to seconds.

    ready: both deployments' engines. Raises InvalidRequest, Unsupported.
    """
    wrong: list[Violation] = []

    def number(field: str, default: int, low: int, high: int) -> int:
        value: int = getattr(request, field) if request.HasField(field) else default  # type: ignore[arg-type]
        if not low <= value <= high:
            wrong.append(Violation(field, f"{value} is out of range; allowed: {low} to {high}"))
        return value

    requests_per_leg = number("requests_per_leg", 16, 1, MAX_REQUESTS)
    num_answers = number("num_answers", 16, 0, MAX_REQUESTS)
    max_blocks = number("max_blocks", 60, 6, MAX_BLOCKS)
    precision = request.precision if request.HasField("precision") else 0.02
    if not 0 < precision < 1:
        wrong.append(Violation("precision", f"{precision:g} is out of range; allowed: above 0, below 1"))
    load = _load(request, wrong)
    if len(request.ladder) > MAX_RUNGS:
        wrong.append(Violation("ladder", f"{len(request.ladder)} rates; allowed: at most {MAX_RUNGS}"))
    wrong.extend(
        Violation(f"ladder[{i}]", f"{rate:g} is out of range; allowed: above 0 to {MAX_RATE:g}")
        for i, rate in enumerate(request.ladder)
        if not 0 < rate <= MAX_RATE
    )
    sampling = _sampling(request, wrong)
    slo = _slo(request, wrong)
    items = _items(request, ready, wrong)
    if not wrong:
        num_blocks = max_blocks + min(SELF_TEST_BLOCKS, max_blocks) + LADDER_BLOCKS * len(request.ladder)
        total = 4 * (num_blocks * requests_per_leg + num_answers) * items[0].max_tokens
        if total > MAX_OUTPUT_TOKENS:
            told = f"up to {total} output tokens in all blocks; allowed: {MAX_OUTPUT_TOKENS}. Take fewer, or lower max_blocks"
            wrong.append(Violation("requests_per_leg", told))
    if wrong:
        raise InvalidRequest(wrong)
    assert load is not None
    plan = Plan(
        workload=Workload(items, fixed_length=not request.natural_lengths, sampling=sampling),
        load=load,
        requests_per_leg=requests_per_leg,
        precision=Precision(precision, min(SELF_TEST_BLOCKS, max_blocks), max_blocks),
        metric=default_metric(load),
        seed=request.seed,
        num_same=num_answers,
        ladder=tuple(request.ladder),
        allowed=tuple(request.allow),
    )
    for _, info in ready:
        # What an engine cannot do is refused here, once, instead of failing every request.
        if "generate" not in info.capabilities:
            raise Unsupported("generate")
        resolve_sampling(plan.workload.sampling_of(items[0]), info, num_prompt_tokens=1, seed=0)
    return plan, slo


def _load(request: pb.CompareRequest, wrong: list[Violation]) -> Load | None:
    kind = request.WhichOneof("load")
    if kind is None:
        return Load("closed")
    value = getattr(request, kind)
    if kind == "concurrency":
        if 1 <= value <= MAX_REQUESTS:
            return Load("closed", concurrency=value)
        wrong.append(Violation(kind, f"{value} is out of range; allowed: 1 to {MAX_REQUESTS}"))
        return None
    if 0 < value <= MAX_RATE:
        return Load("poisson" if kind == "poisson_rate" else "constant", rate=value)
    wrong.append(Violation(kind, f"{value:g} is out of range; allowed: above 0 to {MAX_RATE:g}"))
    return None


def _sampling(request: pb.CompareRequest, wrong: list[Violation]) -> SamplingOverrides:
    if not request.HasField("sampling"):
        return SamplingOverrides(temperature=0.0)
    given = {field.name for field, _ in request.sampling.ListFields()}
    wrong.extend(
        Violation(f"sampling.{name}", "must be unset: a comparison sets it itself")
        for name in _RESERVED
        if name in given
    )
    message = sampling_pb2.SamplingParams()
    message.CopyFrom(request.sampling)
    for name in _RESERVED:
        message.ClearField(name)  # type: ignore[arg-type]
    return convert.sampling_overrides(message)


def _items(
    request: pb.CompareRequest, ready: Sequence[Ready], wrong: list[Violation]
) -> tuple[WorkItem, ...]:
    longest = min(info.limits.max_context_tokens for _, info in ready)
    kind = request.WhichOneof("prompts")
    if kind is None:
        wrong.append(Violation("prompts", "none are given; set synthetic or listed"))
        return ()
    num_output = getattr(request, kind).output_tokens
    if not 1 <= num_output < longest:
        wrong.append(
            Violation(f"{kind}.output_tokens", f"{num_output} is out of range; allowed: 1 to {longest - 1}")
        )
        return ()
    if kind == "synthetic":
        num_prompt = request.synthetic.prompt_tokens
        if not 1 <= num_prompt <= longest - num_output:
            told = f"{num_prompt} is out of range; allowed: 1 to {longest - num_output}"
            wrong.append(Violation("synthetic.prompt_tokens", told))
            return ()
        count = max(1, min(MAX_REQUESTS, MAX_PROMPT_TOKENS // num_prompt))
        vocab_size = min(info.limits.vocab_size for _, info in ready)
        return synthetic(num_prompt, num_output, count, vocab_size=vocab_size, seed=request.seed)
    texts = request.listed.texts
    if not 1 <= len(texts) <= MAX_REQUESTS or not all(texts):
        wrong.append(
            Violation(
                "listed.texts", f"{len(texts)} prompts; allowed: 1 to {MAX_REQUESTS}, none of them empty"
            )
        )
        return ()
    if not wrong:
        _check_texts(texts, ready, longest - num_output)
    return tuple(WorkItem(i, text, num_output, i) for i, text in enumerate(texts))


def _check_texts(texts: Sequence[str], ready: Sequence[Ready], most: int) -> None:
    """Raises InvalidRequest for the first text of more than `most` tokens."""
    for tokenizer in {id(engine): engine.tokenizer for engine, _ in ready}.values():
        for i, text in enumerate(texts):
            num_tokens = tokens_at_least(tokenizer, text, most)
            if num_tokens <= most:
                num_tokens = len(tokenizer.encode(text, add_special_tokens=True))
            if num_tokens > most:
                told = f"has {num_tokens} tokens or more; the context leaves 1 to {most} beside output_tokens"
                raise InvalidRequest.of(f"listed.texts[{i}]", told)


def _slo(request: pb.CompareRequest, wrong: list[Violation]) -> analysis.Slo:
    limits: dict[str, float] = {}
    for name in ("ttft", "tpot", "itl"):
        if request.slo.HasField(name):
            limit: Duration = getattr(request.slo, name)
            limits[f"{name}_s"] = limit.ToNanoseconds() / 1e9
            if limits[f"{name}_s"] <= 0:
                wrong.append(Violation(f"slo.{name}", f"{limits[f'{name}_s']:g} s; allowed: above 0"))
    return analysis.Slo(**limits)


def _progress(progress: Progress) -> pb.CompareProgress:
    message = pb.CompareProgress(phase=_PHASES[progress.phase], done=progress.done, rate=progress.rate)
    if progress.left_s is not None:
        message.left.CopyFrom(convert.duration(progress.left_s))
    return message


def _report(data: RunData, plan: Plan, slo: analysis.Slo) -> pb.CompareReport:
    """Judge. Blocks for seconds."""
    report = make_report(data, analysis.Settings(metric=plan.metric), slo=slo)
    verdict = report.verdict
    page = as_html(report, data)
    message = pb.CompareReport(
        outcome=_OUTCOMES[verdict.outcome],
        words=verdict.words,
        noise_floor=verdict.noise_floor,
        detectable=verdict.detectable,
        metrics=[
            pb.CompareMetric(name=row.name, unit=row.unit, a=row.a, b=row.b, ratio=_ratio(row.ratio))
            for row in report.rows
        ],
        answers=_answers(report),
        page_html=page if len(page.encode()) <= MAX_PAGE_BYTES else "",
        ratio=_ratio(verdict.interval),
    )
    for rung in report.rungs:
        added = message.rungs.add(
            deployment=report.names[rung.arm == "b"],
            rate=rung.rate,
            goodput=rung.goodput,
            tokens_per_second=rung.tokens_per_s,
        )
        added.ttft_p99.CopyFrom(convert.duration(rung.ttft_p99_s))
    return message


def _ratio(interval: Interval | None) -> pb.RatioInterval | None:
    return (
        None
        if interval is None
        else pb.RatioInterval(ratio=interval.ratio, low=interval.low, high=interval.high)
    )


def _answers(report: Report) -> pb.CompareAnswers:
    answers = report.answers
    both = answers.both
    return pb.CompareAnswers(
        pairs=both.num_pairs,
        equal_pairs=both.num_equal_pairs,
        equal_tokens=None if math.isnan(both.equal_tokens) else both.equal_tokens,
        same_reasons=both.same_reasons,
        median_margin=both.median_margin,
        logprob_divergence=both.divergence,
        own_equal_pairs_a=0 if answers.own_a is None else answers.own_a.num_equal_pairs,
        own_equal_pairs_b=0 if answers.own_b is None else answers.own_b.num_equal_pairs,
    )
