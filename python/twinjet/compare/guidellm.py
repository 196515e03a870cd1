"""guidellm's JSON reports (schema version 2, guidellm 0.8): a run written as one, and theirs read. Pure but for the files.

Written from the facts of the format; guidellm itself is not needed. What it counts differently: a benchmark of theirs is
one side alone, so our legs of a side are put end to end on its clock.
"""

from __future__ import annotations

import calendar
import json
import math
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from twinjet.compare.records import Arm, LegFacts, Record, RunData
from twinjet.errors import ConfigError

FORMAT = 2
GUIDELLM_VERSION = "0.8.1"
"""The version whose models what we write is held against."""
_QUANTILES = {
    "p001": 0.001, "p01": 0.01, "p05": 0.05, "p10": 0.1, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p90": 0.9,
    "p95": 0.95, "p99": 0.99, "p999": 0.999,
}  # fmt: skip
_OPEN = frozenset({"constant", "poisson", "trace"})
_UNJUDGED = "these are separate runs of guidellm: not interleaved, and without a self-test that would tell noise from difference"


def write_report(data: RunData, path: Path) -> None:
    """Write the blocks of A against B, and each rate of the ladder, as benchmarks, A's before B's."""
    names = [str(name) for name in data.header.get("names", ("A", "B"))]
    rates = sorted({leg.rate for leg in data.legs if leg.phase == "ladder"})
    benchmarks: list[Mapping[str, Any]] = []
    for phase, rate in [("main", 0.0), *(("ladder", rate) for rate in rates)]:
        for name, arm in zip(names, ("a", "b"), strict=True):
            legs = [leg for leg in data.legs if (leg.phase, leg.rate, leg.arm) == (phase, rate, arm)]
            if legs:
                records = _end_to_end(data, legs)
                benchmarks.append(_benchmark(data, name, len(benchmarks), rate, records, legs))
    report = {
        "metadata": {
            "version": FORMAT,
            "guidellm_version": GUIDELLM_VERSION,
            "python_version": platform.python_version(),
            "platform": platform.platform(),
        },
        "config": {
            "metadata": {"labels": {"tool": "twinjet compare", "a": names[0], "b": names[1]}},
            # Required by the format, which knows HTTP backends alone; what was really asked are the names.
            "spec": {
                "backend": {"kind": "openai_http", "target": " and ".join(names)},
                "profile": _profile(data),
                "data": [{"kind": "in_memory_item_list", "data": [str(data.header.get("digest", ""))]}],
            },
        },
        "benchmarks": benchmarks,
    }
    path.write_text(json.dumps(report), encoding="utf-8")


def _started_at(data: RunData) -> float:
    text = str(data.header.get("started_at") or "")
    try:
        return float(calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ")))
    except ValueError:
        return 0.0


def _end_to_end(data: RunData, legs: Sequence[LegFacts]) -> list[Record]:
    """Give a side's records on one clock, seconds from the Unix epoch, each leg beginning where the one before ended."""
    records: dict[tuple[int, int], list[Record]] = {}
    for record in data.records:
        if (record.phase, record.rate, record.arm) == (legs[0].phase, legs[0].rate, legs[0].arm):
            records.setdefault((record.block, record.leg), []).append(record)
    moved: list[Record] = []
    at = _started_at(data)
    for leg in sorted(legs, key=lambda leg: (leg.block, leg.leg)):
        mine = records.get((leg.block, leg.leg), [])
        if mine:
            by = at - min(min(r.intended_at, r.sent_at) for r in mine)
            moved.extend(
                replace(
                    r, intended_at=r.intended_at + by, sent_at=r.sent_at + by, ended_at=r.ended_at + by,
                    token_times=tuple(t + by for t in r.token_times),
                )
                for r in mine
            )  # fmt: skip
        at += leg.seconds
    return moved


def _benchmark(
    data: RunData, name: str, index: int, rate: float, records: Sequence[Record], legs: Sequence[LegFacts]
) -> Mapping[str, Any]:
    good = [r for r in records if not r.error]
    bad = [r for r in records if r.error]
    begin, seconds = _started_at(data), math.fsum(leg.seconds for leg in legs)
    counts = {"successful": len(good), "errored": len(bad), "incomplete": 0, "total": len(records)}
    return {
        "type_": "generative_benchmark",
        "config": {
            "run_id": str(data.header.get("digest", "")),
            "run_index": index,
            "strategy": _strategy(data, rate),
            "constraints": {},
            "profile": {},
            "requests": {"digest": data.header.get("digest", "")},
            "backend": {"type_": "twinjet", "model": name},
            "environment": {"machine": data.header.get("machine", "")},
        },
        "scheduler_state": {
            "start_time": begin,
            "end_time": begin + seconds,
            "created_requests": len(records),
            "processed_requests": len(records),
            "successful_requests": len(good),
            "errored_requests": len(bad),
        },
        "scheduler_metrics": _scheduler_metrics(records, begin, seconds, counts),
        "metrics": _metrics(good, bad, seconds, counts),
        "requests": {
            "successful": [_request(r) for r in good],
            "errored": [_request(r) for r in bad],
            "incomplete": [],
            "total": None,
        },
    }


def _strategy(data: RunData, rate: float) -> Mapping[str, Any]:
    load = data.header.get("load", {})
    if rate or load.get("kind") == "poisson":
        return {"type_": "poisson", "rate": rate or load["rate"], "random_seed": data.header.get("seed", 0)}
    if load.get("kind") == "constant":
        return {"type_": "constant", "rate": load["rate"]}
    if load.get("kind") == "trace":
        return {"type_": "trace"}
    return {"type_": "concurrent", "streams": load.get("concurrency", 1)}


def _profile(data: RunData) -> Mapping[str, Any]:
    strategy = _strategy(data, 0.0)
    match strategy["type_"]:
        case "concurrent":
            return {"kind": "concurrent", "streams": [strategy["streams"]]}
        case "trace":
            return {"kind": "replay"}
        case kind:
            return {"kind": kind, "rate": [strategy["rate"]]}


def _scheduler_metrics(
    records: Sequence[Record], begin: float, seconds: float, counts: Mapping[str, int]
) -> Mapping[str, Any]:
    lags = [r.lag_s for r in records]
    times = [r.ended_at - r.sent_at for r in records]
    lag, took = (float(np.mean(values)) if values else 0.0 for values in (lags, times))
    return {
        "start_time": begin,
        "request_start_time": begin,
        "measure_start_time": begin,
        "measure_end_time": begin + seconds,
        "request_end_time": begin + seconds,
        "end_time": begin + seconds,
        "requests_made": dict(counts),
        "queued_time_avg": 0.0,
        "resolve_start_delay_avg": lag,
        "resolve_targeted_start_delay_avg": lag,
        "request_start_delay_avg": lag,
        "request_targeted_start_delay_avg": lag,
        "request_time_avg": took,
        "resolve_end_delay_avg": 0.0,
        "resolve_time_avg": took,
        "finalized_delay_avg": 0.0,
        "processed_delay_avg": 0.0,
    }


def _request(record: Record) -> Mapping[str, Any]:
    times = record.token_times
    request_id = f"{record.phase}-{record.block}-{record.leg}-{record.index}"
    return {
        "type_": "generative_request_stats",
        "request_id": request_id,
        "output": record.text or None,
        "info": {
            "request_id": request_id,
            "status": "errored" if record.error else "completed",
            "error": record.error or None,
            "timings": {
                "targeted_start": record.intended_at,
                "resolve_start": record.sent_at,
                "request_start": record.sent_at,
                "first_token_iteration": times[0] if times else None,
                "first_output_token_iteration": times[0] if times else None,
                "last_token_iteration": times[-1] if times else None,
                "token_iterations": len(set(times)),
                "request_iterations": len(set(times)),
                "request_end": record.ended_at,
                "resolve_end": record.ended_at,
            },
        },
        "input_metrics": {"text_tokens": record.num_prompt_tokens or None},
        "output_metrics": {"text_tokens": len(record.token_ids)},
    }


def _metrics(
    good: Sequence[Record], bad: Sequence[Record], seconds: float, counts: Mapping[str, int]
) -> Mapping[str, Any]:
    tokens = [len(r.token_ids) for r in good]
    prompts = [r.num_prompt_tokens for r in good]
    # guidellm's latencies count from the moment of sending; from the intended start they have a name of their own.
    firsts = [1e3 * (r.token_times[0] - r.sent_at) for r in good if r.token_times]
    totals = [r.ended_at - r.sent_at for r in good]
    iterations = [len(set(r.token_times)) for r in good]

    def rate(count: float) -> Mapping[str, Any]:
        return _by_status([count / seconds if seconds else 0.0])

    per_token = [
        1e3 * (r.token_times[-1] - r.sent_at) / len(r.token_ids)
        for r in good
        if r.token_ids and r.token_times
    ]
    values: dict[str, Any] = {
        "request_totals": dict(counts),
        "requests_per_second": rate(len(good)),
        "request_concurrency": _by_status([math.fsum(totals) / seconds if seconds else 0.0]),
        "request_latency": _by_status(totals, [r.ended_at - r.sent_at for r in bad]),
        "request_dispatch_delay": _by_status([r.lag_s for r in good]),
        "request_scheduled_latency": _by_status([r.e2e_s for r in good]),
        "request_streaming_iterations_count": _by_status(iterations),
        "prompt_token_count": _by_status(prompts),
        "output_token_count": _by_status(tokens),
        "total_token_count": _by_status([t + p for t, p in zip(tokens, prompts, strict=True)]),
        "time_to_first_token_ms": _by_status(firsts),
        "time_to_first_output_token_ms": _by_status(firsts),
        "time_per_output_token_ms": _by_status(per_token),
        "inter_token_latency_ms": _by_status([1e3 * r.tpot_s for r in good if r.tpot_s is not None]),
        "time_to_last_round_trip_ms": _by_status([]),
        "avg_round_trip_time_ms": _by_status([]),
        "prompt_tokens_per_second": rate(sum(prompts)),
        "output_tokens_per_second": rate(sum(tokens)),
        "tokens_per_second": rate(sum(tokens) + sum(prompts)),
        "output_tokens_per_iteration": _by_status(
            [t / n for t, n in zip(tokens, iterations, strict=True) if n]
        ),
        "iter_tokens_per_iteration": _by_status(
            [(t - 1) / (n - 1) for t, n in zip(tokens, iterations, strict=True) if n > 1]
        ),
        "text": {"tokens": None, "words": None, "characters": None},
        "image": {"tokens": None, "images": None, "pixels": None, "bytes": None},
        "video": {"tokens": None, "frames": None, "seconds": None, "bytes": None},
        "audio": {"tokens": None, "samples": None, "seconds": None, "bytes": None},
        "tool_call": {"tokens": None, "mixed_tokens": None, "count": None},
    }
    return values


def _by_status(successful: Iterable[float], errored: Iterable[float] = ()) -> Mapping[str, Any]:
    good, bad = list(successful), list(errored)
    return {
        "successful": _distribution(good),
        "errored": _distribution(bad),
        "incomplete": _distribution([]),
        "total": _distribution([*good, *bad]),
    }


def _distribution(values: Sequence[float]) -> Mapping[str, Any]:
    found = np.asarray(values if values else [0.0], dtype=np.float64)
    kinds, counts = np.unique(found, return_counts=True)
    return {
        "mean": float(found.mean()),
        "median": float(np.median(found)),
        "mode": float(kinds[counts.argmax()]),
        "variance": float(found.var()),
        "std_dev": float(found.std()),
        "min": float(found.min()),
        "max": float(found.max()),
        "count": len(values),
        "total_sum": float(found.sum()),
        "percentiles": {name: float(np.quantile(found, q)) for name, q in _QUANTILES.items()},
    }


def read_reports(paths: Sequence[Path]) -> RunData:
    """Read the first two benchmarks of one report, or the first of each of two, as A and B: to be shown, not judged.

    guidellm keeps of a request the first and the last token's time; those between are put evenly, which leaves means as
    they are and tells nothing of gaps. Raises ConfigError.
    """
    found = [(path, benchmark) for path in paths for benchmark in _benchmarks(path)[: 3 - len(paths)]]
    if len(found) != 2:
        raise ConfigError(
            f"{paths[0]} holds {len(found)} benchmark; two are needed: name the other file by --other"
        )
    header: dict[str, Any] = {
        "names": _unique_names([_name(path, benchmark) for path, benchmark in found]),
        "metric": "e2e",
        "source": "guidellm",
        "has_tokens": False,
        "unjudged": _UNJUDGED,
        "files": [str(path) for path in paths],
    }
    data = RunData(header)
    arms: tuple[Arm, Arm] = ("a", "b")
    for leg, (arm, (path, benchmark)) in enumerate(zip(arms, found, strict=True)):
        try:
            records = _records(benchmark, arm, leg)
            began, ended = (
                float(benchmark["scheduler_metrics"][f"measure_{end}_time"]) for end in ("start", "end")
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"{path}: not a benchmark as guidellm writes them: {error!r}") from None
        data.records.extend(records)
        data.legs.append(LegFacts("main", 0, leg, arm, ended - began, 0.0))
    # A whole block has four legs; theirs has nothing in the other two.
    data.legs.extend([LegFacts("main", 0, 2, "b", 0.0, 0.0), LegFacts("main", 0, 3, "a", 0.0, 0.0)])
    return data


def _benchmarks(path: Path) -> Sequence[Mapping[str, Any]]:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        benchmarks = report["benchmarks"]
        version = report.get("metadata", {}).get("version", FORMAT)
        if not isinstance(benchmarks, list):
            raise TypeError("benchmarks is no list")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not a report of guidellm: {error!r}") from None
    if not all(isinstance(benchmark, dict) for benchmark in benchmarks):
        raise ConfigError(f"{path}: not a benchmark as guidellm writes them: no object")
    if version != FORMAT:
        raise ConfigError(f"{path}: guidellm's report version {version}; known: {FORMAT}")
    return benchmarks


def _name(path: Path, benchmark: Mapping[str, Any]) -> str:
    backend = (benchmark.get("config") or {}).get("backend") or {}
    return str(backend.get("model") or path.stem)


def _unique_names(names: Sequence[str]) -> list[str]:
    return (
        list(names) if len(set(names)) == len(names) else [f"{n} ({i})" for i, n in enumerate(names, start=1)]
    )


def _records(benchmark: Mapping[str, Any], arm: Arm, leg: int) -> list[Record]:
    requests = benchmark["requests"]
    found = [*(requests.get("successful") or []), *(requests.get("errored") or [])]
    # Elsewhere their target is "as soon as possible", which is no intended start.
    is_open = ((benchmark.get("config") or {}).get("strategy") or {}).get("type_") in _OPEN
    return [_record(request, arm, leg, index, is_open=is_open) for index, request in enumerate(found)]


def _record(request: Mapping[str, Any], arm: Arm, leg: int, index: int, *, is_open: bool) -> Record:
    info = request["info"]
    timings = info["timings"]
    sent = _first(timings, "request_start", "resolve_start")
    ended = _first(timings, "request_end", "resolve_end")
    if sent is None or ended is None:
        raise ValueError("a request without its start or end")
    intended = timings.get("targeted_start") if is_open else None
    count = (request.get("output_metrics") or {}).get("text_tokens") or timings.get("token_iterations") or 0
    first, last = timings.get("first_token_iteration"), timings.get("last_token_iteration")
    times: tuple[float, ...] = ()
    if first is not None and count:
        gap = ((last if last is not None else first) - first) / max(1, count - 1)
        times = tuple(first + i * gap for i in range(count))
    return Record(
        "main", 0, leg, arm, index,
        min(intended, sent) if intended is not None else sent, sent, ended, times, (0,) * count,
        error="" if info["status"] == "completed" else str(info.get("error") or info["status"]),
        num_prompt_tokens=(request.get("input_metrics") or {}).get("text_tokens") or 0,
    )  # fmt: skip


def _first(timings: Mapping[str, Any], *names: str) -> float | None:
    return next((float(timings[name]) for name in names if timings.get(name) is not None), None)
