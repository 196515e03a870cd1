"""From a run's raw data to its verdict: totals of blocks, validity, and metrics. Pure: needs no server."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from twinjet.compare.records import Arm, LegFacts, Phase, Record, RunData
from twinjet.compare.sameness import Answer, SchemaCheck, compare_answers, reasons, summarize
from twinjet.compare.sameness import Sameness as Sameness
from twinjet.compare.statistics import (
    MIN_BLOCKS,
    BlockTotals,
    Interval,
    Verdict,
    compare,
    not_comparable,
    quantile_ratio_interval,
)

Metric = Literal["token_time", "e2e", "ttft", "tpot"]
"""token_time: wall time of a leg a token (the reciprocal of throughput). The others: mean over requests."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What is judged and when a run counts. max_lag_share: client's own p99 delay in sending, of the median e2e time.

    max_cpu: share of one core that the client may use. max_failed: share of requests that may fail in either arm.
    min_achieved: achieved of offered rate, below which an open loop was no longer open.
    """

    metric: Metric = "token_time"
    max_lag_share: float = 0.05
    max_cpu: float = 0.9
    max_failed: float = 0.01
    min_achieved: float = 0.9


def block_totals(data: RunData, phase: Phase, settings: Settings, rate: float = 0.0) -> list[BlockTotals]:
    """Give the totals of the complete blocks of a phase, over the requests that ended well in both arms."""
    legs = {(leg.block, leg.leg): leg for leg in data.legs if leg.phase == phase and leg.rate == rate}
    records: dict[tuple[int, int], dict[int, Record]] = {}
    for record in data.records:
        if record.phase == phase and record.rate == rate:
            records.setdefault((record.block, record.leg), {})[record.index] = record
    totals = []
    for block in data.complete_blocks(phase, rate):
        costs: dict[Arm, float] = {"a": 0.0, "b": 0.0}
        for first, second in ((0, 1), (3, 2)):
            pairs = _good_pairs(records[block, first], records[block, second])
            for arm, side, leg in (("a", 0, first), ("b", 1, second)):
                costs[arm] += _cost([pair[side] for pair in pairs], legs[block, leg], settings.metric)  # type: ignore[index]
        if costs["a"] > 0 and costs["b"] > 0:
            totals.append(BlockTotals(costs["a"], costs["b"]))
    return totals


def _good_pairs(a: dict[int, Record], b: dict[int, Record]) -> list[tuple[Record, Record]]:
    return [(a[index], b[index]) for index in a if index in b and not a[index].error and not b[index].error]


def _cost(records: Sequence[Record], leg: LegFacts, metric: Metric) -> float:
    match metric:
        case "token_time":
            tokens = sum(len(record.token_ids) for record in records)
            return leg.seconds / tokens if tokens else 0.0
        case "e2e":
            return math.fsum(record.e2e_s for record in records)
        case "ttft":
            return math.fsum(record.ttft_s or 0.0 for record in records)
        case "tpot":
            return math.fsum(record.tpot_s or 0.0 for record in records)


@dataclass(frozen=True, slots=True)
class ClientFacts:
    """The load generator's own side. lag_p99_s: how late it sent. cpu: share of a core. achieved: of the offered rate."""

    lag_p99_s: float
    cpu: float
    offered: float | None
    achieved: float | None


def client_facts(data: RunData, phase: Phase = "main") -> ClientFacts:
    """Say how the client itself did in a phase."""
    records = [record for record in data.records if record.phase == phase]
    legs = [leg for leg in data.legs if leg.phase == phase]
    if not records or not legs:
        return ClientFacts(0.0, 0.0, None, None)
    seconds = math.fsum(leg.seconds for leg in legs)
    cpu = math.fsum(leg.cpu_s for leg in legs) / seconds if seconds else 0.0
    lags = [record.lag_s for record in records]
    offered = achieved = None
    if any(lag > 0 for lag in lags) or _is_open(data):
        offered, achieved = _rates(records)
    return ClientFacts(float(np.quantile(lags, 0.99)), cpu, offered, achieved)


def _is_open(data: RunData) -> bool:
    return bool(data.header.get("load", {}).get("kind", "closed") != "closed")


def _rates(records: Sequence[Record]) -> tuple[float | None, float | None]:
    """Requests a second as intended and as sent, over legs."""
    legs: dict[tuple[int, int, float], list[Record]] = {}
    for record in records:
        legs.setdefault((record.block, record.leg, record.rate), []).append(record)
    count, intended, sent = 0, 0.0, 0.0
    for leg in legs.values():
        if len(leg) < 2:
            continue
        count += len(leg) - 1
        intended += max(r.intended_at for r in leg) - min(r.intended_at for r in leg)
        sent += max(r.sent_at for r in leg) - min(r.intended_at for r in leg)
    if not count or intended <= 0 or sent <= 0:
        return None, None
    return count / intended, count / sent


def invalid(data: RunData, settings: Settings) -> str:
    """Say why a run's numbers must not be judged; "" if they may."""
    for phase in ("self", "main"):
        records = [record for record in data.records if record.phase == phase]
        if not records:
            return "the run was ended before anything was measured"
        for arm in ("a", "b"):
            mine = [record for record in records if record.arm == arm]
            failed = [record for record in mine if record.error]
            if len(failed) > settings.max_failed * len(mine):
                return f"{len(failed)} of {len(mine)} requests failed in {arm.upper()}: {failed[0].error}"
        facts = client_facts(data, phase)
        median = float(np.median([record.e2e_s for record in records]))
        if facts.lag_p99_s > settings.max_lag_share * median:
            return (
                f"the client lagged: its p99 delay in sending was {1e3 * facts.lag_p99_s:.0f} ms, "
                f"with a median request of {1e3 * median:.0f} ms"
            )
        if facts.cpu > settings.max_cpu and not data.header.get("in_process"):
            return f"the client itself was busy: {100 * facts.cpu:.0f}% of a core"
        if facts.offered and facts.achieved and facts.achieved < settings.min_achieved * facts.offered:
            return f"only {facts.achieved:.2f} of {facts.offered:.2f} requests/s were sent"
    return ""


def judge(data: RunData, settings: Settings, *, a: str = "A", b: str = "B", seed: int = 0) -> Verdict:
    """Give the verdict on a run."""
    if reason := str(data.header.get("unjudged") or ""):
        return not_comparable(reason)
    if reason := invalid(data, settings):
        return not_comparable(reason)
    own, blocks = block_totals(data, "self", settings), block_totals(data, "main", settings)
    for name, found in (("against itself", own), ("against the other", blocks)):
        if len(found) < MIN_BLOCKS:
            return not_comparable(
                f"only {len(found)} complete blocks of {a} {name}; at least {MIN_BLOCKS} are needed"
            )
    drift = math.hypot(phase_drift(data, settings), float(data.header.get("recorded_drift", 0.0)))
    return compare(own, blocks, a=a, b=b, seed=seed, drift=drift if is_against_record(data) else 0.0)


def is_against_record(data: RunData) -> bool:
    """Whether B is an arm of an earlier run."""
    return bool(data.header.get("recorded"))


def phase_drift(data: RunData, settings: Settings) -> float:
    """Give by how much A's costs changed between its self-test and its blocks against B, relative; 0 without both.

    A measure of what changed meanwhile, for sides that did not run close together.
    """
    own, main = block_totals(data, "self", settings), block_totals(data, "main", settings)
    if not own or not main:
        return 0.0
    before = math.fsum(block.a + block.b for block in own) / (2 * len(own))
    after = math.fsum(block.a for block in main) / len(main)
    return abs(math.log(after / before))


@dataclass(frozen=True, slots=True)
class Quantiles:
    """A latency's quantiles in both arms, seconds, and the ratio B / A of the p50 and p99 with 95% intervals."""

    a: tuple[float, float, float]
    b: tuple[float, float, float]
    p50: Interval | None
    p99: Interval | None


def latency(
    data: RunData, metric: Literal["ttft", "tpot", "itl", "e2e"], phase: Phase = "main"
) -> Quantiles | None:
    """Give p50, p90 and p99 of a latency; None where nothing was measured."""
    sides: dict[Arm, dict[int, list[float]]] = {"a": {}, "b": {}}
    blocks = set(data.complete_blocks(phase))
    for record in data.records:
        if record.phase == phase and record.block in blocks and not record.error:
            sides[record.arm].setdefault(record.block, []).extend(latency_values(record, metric))
    both = sorted(block for block in blocks if sides["a"].get(block) and sides["b"].get(block))
    if not both:
        return None
    a, b = ([sides[arm][block] for block in both] for arm in ("a", "b"))
    whole = [tuple(float(q) for q in np.quantile(np.concatenate(side), [0.5, 0.9, 0.99])) for side in (a, b)]
    p50 = p99 = None
    if len(both) >= MIN_BLOCKS and min(map(min, a)) > 0 and min(map(min, b)) > 0:
        p50, p99 = (quantile_ratio_interval(a, b, q, num_resamples=500) for q in (0.5, 0.99))
    return Quantiles(whole[0], whole[1], p50, p99)  # type: ignore[arg-type]


def latency_values(record: Record, metric: str) -> list[float]:
    """Give what one request contributes to a latency ("ttft", "tpot", "itl", "e2e"), seconds."""
    if metric == "itl":
        return list(record.itl_s())
    value = {"ttft": record.ttft_s, "tpot": record.tpot_s, "e2e": record.e2e_s}[metric]
    return [] if value is None else [value]


def throughput(data: RunData, arm: Arm, phase: Phase = "main") -> float | None:
    """Output tokens a second of an arm while its legs ran; None where nothing was measured."""
    seconds = math.fsum(leg.seconds for leg in data.legs if leg.phase == phase and leg.arm == arm)
    tokens = sum(len(r.token_ids) for r in data.records if r.phase == phase and r.arm == arm and not r.error)
    return tokens / seconds if seconds > 0 and tokens else None


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits in seconds that a request must keep to count; None is no limit. itl: its largest gap."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    itl_s: float | None = None

    def is_met(self, record: Record) -> bool:
        """Whether a request kept all limits; one that failed kept none."""
        if record.error or record.ttft_s is None:
            return False
        pairs = (
            (record.ttft_s, self.ttft_s),
            (record.tpot_s or 0.0, self.tpot_s),
            (max(record.itl_s(), default=0.0), self.itl_s),
        )
        return all(limit is None or value <= limit for value, limit in pairs)


@dataclass(frozen=True, slots=True)
class Rung:
    """One offered rate of the ladder for one arm. goodput: requests a second that kept the limits."""

    arm: Arm
    rate: float
    achieved: float | None
    goodput: float
    tokens_per_s: float
    ttft_p50_s: float
    ttft_p99_s: float


def ladder(data: RunData, slo: Slo) -> list[Rung]:
    """Give what each rate of the ladder brought."""
    rungs = []
    for rate in sorted({leg.rate for leg in data.legs if leg.phase == "ladder"}):
        for arm in ("a", "b"):
            records = [r for r in data.records if r.phase == "ladder" and r.rate == rate and r.arm == arm]
            seconds = math.fsum(
                leg.seconds
                for leg in data.legs
                if leg.phase == "ladder" and leg.rate == rate and leg.arm == arm
            )
            firsts = [r.ttft_s for r in records if r.ttft_s is not None]
            if not records or seconds <= 0 or not firsts:
                continue
            p50, p99 = np.quantile(firsts, [0.5, 0.99])
            rungs.append(
                Rung(
                    arm,
                    rate,
                    _rates(records)[1],
                    sum(map(slo.is_met, records)) / seconds,
                    sum(len(r.token_ids) for r in records) / seconds,
                    float(p50),
                    float(p99),
                )
            )
    return rungs


@dataclass(frozen=True, slots=True)
class Example:
    """Where two answers part: the request's place, the first token that differs, and what either side went on with."""

    index: int
    place: int
    margin: float | None
    token_a: int | None
    token_b: int | None
    text_a: str
    text_b: str


@dataclass(frozen=True, slots=True)
class Answers:
    """What is known of answers beside how alike they are. is_natural: they ended where the model ends them.

    own_a, own_b: a side's answers against its own second ones; None where there are none. valid_a, valid_b: answers that
    fit the schema, None without one. examples: the first few that part.
    """

    is_natural: bool
    both: Sameness
    own_a: Sameness | None
    own_b: Sameness | None
    reasons_a: Mapping[str, int]
    reasons_b: Mapping[str, int]
    num_a: int
    num_b: int
    valid_a: int | None
    valid_b: int | None
    examples: tuple[Example, ...]


MAX_EXAMPLES = 5


def answers(data: RunData) -> Answers:
    """Hold answers against each other, paired by request: natural ones if there are any, else those of the speed run."""
    found = answer_pairs(data)
    is_natural = "A and itself" in found
    by_leg = _by_leg(data, "sameness" if is_natural else "main")
    legs = ((0, 1),) if is_natural else ((0, 1), (3, 2))
    a, b = ([r for pair in legs for r in by_leg[pair[side]].values()] for side in (0, 1))
    schema = str(data.header.get("json_schema") or "")
    check = SchemaCheck(schema) if schema and is_natural else None
    pairs = found["A and B"]
    return Answers(
        is_natural,
        _sameness(pairs),
        _sameness(found["A and itself"]) if is_natural else None,
        _sameness(found["B and itself"]) if is_natural else None,
        reasons([_answer(record) for record in a]),
        reasons([_answer(record) for record in b]),
        len(a),
        len(b),
        None if check is None else sum(check.is_valid(record.text) for record in a),
        None if check is None else sum(check.is_valid(record.text) for record in b),
        tuple(_examples(pairs)),
    )


def answer_pairs(data: RunData) -> Mapping[str, list[tuple[Record, Record]]]:
    """Give answers to the same requests: "A and B" and, where natural answers were asked for twice, each and itself."""
    if data.header.get("has_tokens") is False:
        return {"A and B": []}
    if any(leg.phase == "sameness" for leg in data.legs):
        legs = _by_leg(data, "sameness")
        return {
            "A and B": _record_pairs(legs[0], legs[1]),
            "A and itself": _record_pairs(legs[0], legs[3]),
            "B and itself": _record_pairs(legs[1], legs[2]),
        }
    # The two halves of a block in the speed run are of other requests.
    legs = _by_leg(data, "main")
    return {"A and B": _record_pairs(legs[0], legs[1]) + _record_pairs(legs[3], legs[2])}


def _by_leg(data: RunData, phase: Phase) -> Mapping[int, dict[tuple[int, int], Record]]:
    by_leg: dict[int, dict[tuple[int, int], Record]] = {leg: {} for leg in range(4)}
    for record in data.records:
        if record.phase == phase and not record.error:
            by_leg[record.leg][record.block, record.index] = record
    return by_leg


def _record_pairs(
    a: Mapping[tuple[int, int], Record], b: Mapping[tuple[int, int], Record]
) -> list[tuple[Record, Record]]:
    return [(record, b[key]) for key, record in a.items() if key in b]


def _sameness(pairs: Sequence[tuple[Record, Record]]) -> Sameness:
    return summarize([compare_answers(_answer(a), _answer(b)) for a, b in pairs])


def _answer(record: Record) -> Answer:
    return Answer(record.token_ids, record.chances, record.reason, record.text)


def _examples(pairs: Sequence[tuple[Record, Record]]) -> list[Example]:
    found: list[Example] = []
    for a, b in pairs:
        pair = compare_answers(_answer(a), _answer(b))
        if pair.first_difference is None:
            continue
        place = pair.first_difference
        tokens = [r.token_ids[place] if place < len(r.token_ids) else None for r in (a, b)]
        found.append(Example(a.index, place, pair.margin, tokens[0], tokens[1], a.text, b.text))
        if len(found) == MAX_EXAMPLES:
            break
    return found


def agreement(data: RunData) -> list[tuple[str, str, list[tuple[int, int]], bool]]:
    """Give, for the plot: name, color, (equal tokens, compared tokens) of each pair, and whether it is a side and itself."""
    found = answer_pairs(data)
    colors = {"A and B": "#1f2328", "A and itself": "#1f6feb", "B and itself": "#d1242f"}
    lines = []
    for name, pairs in found.items():
        alike = [compare_answers(_answer(a), _answer(b)) for a, b in pairs]
        places = [
            (p.num_equal if p.first_difference is not None else p.num_compared, p.num_compared) for p in alike
        ]
        lines.append((name, colors[name], places, name != "A and B"))
    return lines
