"""A comparison of two deployments as frozen dataclasses: what to run, how far it is, what was found. Times in seconds.

The meaning of each field is that of the field of the same name in proto/twinjet/v1/compare.proto.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from google.protobuf.message import Message as ProtoMessage

from twinjet.client._requests import Sampling, duration, filled, sampling_message
from twinjet.v1 import compare_pb2 as pb

Phase = Literal["answers", "self", "main", "ladder", "unknown"]
Outcome = Literal["a_faster", "b_faster", "no_difference", "not_comparable", "unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What to compare and how. Either prompts, or prompt_tokens for random ones; None is the server's default.

    concurrency is a closed loop, the rates (requests a second) are open ones; one of the three at most.
    ttft_s, tpot_s, itl_s: limits that goodput counts by.
    """

    deployment_a: str
    deployment_b: str
    output_tokens: int
    prompt_tokens: int | None = None
    prompts: Sequence[str] = ()
    sampling: Sampling | None = None
    concurrency: int | None = None
    poisson_rate: float | None = None
    constant_rate: float | None = None
    requests_per_leg: int | None = None
    precision: float | None = None
    max_blocks: int | None = None
    num_answers: int | None = None
    natural_lengths: bool = False
    ladder: Sequence[float] = ()
    ttft_s: float | None = None
    tpot_s: float | None = None
    itl_s: float | None = None
    allow: Sequence[str] = ()
    seed: int = 0


@dataclass(frozen=True, slots=True)
class CompareStarted:
    """What is run. settings_a, settings_b: effective ones, by name."""

    digest: str
    settings_a: Mapping[str, str]
    settings_b: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class CompareProgress:
    """How far it is. done: 0 to 1. left_s: of this phase, None before that is known."""

    phase: Phase
    done: float
    left_s: float | None
    rate: float


@dataclass(frozen=True, slots=True)
class RatioInterval:
    """A ratio B / A with its 95% interval."""

    ratio: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class CompareMetric:
    """One measured quantity of both sides. ratio: None where no interval can be given."""

    name: str
    unit: str
    a: float
    b: float
    ratio: RatioInterval | None


@dataclass(frozen=True, slots=True)
class CompareAnswers:
    """How alike the answers are; None is not known."""

    pairs: int
    equal_pairs: int
    equal_tokens: float | None
    same_reasons: int
    median_margin: float | None
    logprob_divergence: float | None
    own_equal_pairs_a: int
    own_equal_pairs_b: int


@dataclass(frozen=True, slots=True)
class CompareRung:
    """What one rate of the ladder brought on one side."""

    deployment: str
    rate: float
    goodput: float
    tokens_per_second: float
    ttft_p99_s: float


@dataclass(frozen=True, slots=True)
class CompareReport:
    """What was found; last. ratio, noise_floor and detectable are None where nothing may be said."""

    outcome: Outcome
    words: str
    ratio: RatioInterval | None
    noise_floor: float | None
    detectable: float | None
    metrics: tuple[CompareMetric, ...]
    answers: CompareAnswers
    rungs: tuple[CompareRung, ...]
    page_html: str


CompareEvent = CompareStarted | CompareProgress | CompareReport


def compare_request(comparison: Comparison) -> pb.CompareRequest:
    """Build the message. Raises BadRequest for what no message can carry."""
    c = comparison
    limits = {name: duration(f"slo.{name}", getattr(c, f"{name}_s")) for name in ("ttft", "tpot", "itl")}
    slo = filled(pb.LatencyLimits(), limits, "slo.") if any(limits.values()) else None
    synthetic = listed = None
    if c.prompt_tokens is not None:
        shape = {"prompt_tokens": c.prompt_tokens, "output_tokens": c.output_tokens}
        synthetic = filled(pb.SyntheticPrompts(), shape, "synthetic.")
    elif c.prompts:
        texts = {"texts": list(c.prompts), "output_tokens": c.output_tokens}
        listed = filled(pb.ListedPrompts(), texts, "listed.")
    return filled(
        pb.CompareRequest(),
        {
            "deployment_a": c.deployment_a, "deployment_b": c.deployment_b, "synthetic": synthetic, "listed": listed,
            "sampling": sampling_message(c.sampling), "concurrency": c.concurrency, "poisson_rate": c.poisson_rate,
            "constant_rate": c.constant_rate, "requests_per_leg": c.requests_per_leg, "precision": c.precision,
            "max_blocks": c.max_blocks, "num_answers": c.num_answers, "natural_lengths": c.natural_lengths,
            "ladder": list(c.ladder), "slo": slo, "allow": list(c.allow), "seed": c.seed,
        },
    )  # fmt: skip


def compare_event_of(message: pb.CompareResponse) -> CompareEvent | None:
    """Translate one message; None for an event of a newer contract than this client knows."""
    match message.WhichOneof("event"):
        case "started":
            started = message.started
            return CompareStarted(started.digest, dict(started.settings_a), dict(started.settings_b))
        case "progress":
            progress = message.progress
            left_s = progress.left.ToNanoseconds() / 1e9 if progress.HasField("left") else None
            phase: Any = _short(pb.ComparePhase, progress.phase, "COMPARE_PHASE_")
            return CompareProgress(phase, progress.done, left_s, progress.rate)
        case "report":
            return _report(message.report)
    return None


def _report(report: pb.CompareReport) -> CompareReport:
    answers = report.answers
    outcome: Any = _short(pb.CompareOutcome, report.outcome, "COMPARE_OUTCOME_")
    return CompareReport(
        outcome,
        report.words,
        _ratio(report.ratio) if report.HasField("ratio") else None,
        _optional(report, "noise_floor"),
        _optional(report, "detectable"),
        tuple(
            CompareMetric(m.name, m.unit, m.a, m.b, _ratio(m.ratio) if m.HasField("ratio") else None)
            for m in report.metrics
        ),
        CompareAnswers(
            answers.pairs,
            answers.equal_pairs,
            _optional(answers, "equal_tokens"),
            answers.same_reasons,
            _optional(answers, "median_margin"),
            _optional(answers, "logprob_divergence"),
            answers.own_equal_pairs_a,
            answers.own_equal_pairs_b,
        ),
        tuple(
            CompareRung(
                rung.deployment, rung.rate, rung.goodput, rung.tokens_per_second,
                rung.ttft_p99.ToNanoseconds() / 1e9,
            )
            for rung in report.rungs
        ),
        report.page_html,
    )  # fmt: skip


def _ratio(message: pb.RatioInterval) -> RatioInterval:
    return RatioInterval(message.ratio, message.low, message.high)


def _optional(message: ProtoMessage, name: str) -> Any:
    return getattr(message, name) if message.HasField(name) else None


def _short(enum: Any, number: int, prefix: str) -> str:
    """Give an enum's value in lower case without its prefix; "unknown" for one of a newer contract, and for none."""
    if not number or number not in enum.values():
        return "unknown"
    name: str = enum.Name(number)
    return name.removeprefix(prefix).lower()
