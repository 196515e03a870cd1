"""What the flags of `twinjet compare` mean: a plan, limits, prices; and which of them an earlier run fixes."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from twinjet.compare.analysis import Metric, Slo
from twinjet.compare.arguments import compare_arguments
from twinjet.compare.plan import SELF_TEST_BLOCKS, Plan, default_metric
from twinjet.compare.sameness import SchemaCheck
from twinjet.compare.statistics import Precision
from twinjet.compare.workload import Load, WorkItem, Workload, read_prompts, read_trace, synthetic
from twinjet.errors import ConfigError
from twinjet.request import Constraint, SamplingOverrides

NUM_SYNTHETIC = 4096
"""Synthetic requests made; a longer run goes through them again, with other places in the prefix cache."""
_TOGETHER = (("prompts", "synthetic"), ("concurrency", "rate", "constant_rate", "trace"))
"""Flags of which one replaces the others."""
REQUEST_FLAGS = (
    "prompts", "synthetic", "max_tokens", "temperature", "top_p", "top_k", "seed", "concurrency", "rate",
    "constant_rate", "trace", "requests", "natural", "json_schema", "answers",
)  # fmt: skip
RUN_FLAGS = (*REQUEST_FLAGS, "precision", "max_blocks", "metric", "ladder", "allow")


def _defaults() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    compare_arguments(parser)
    return parser.parse_args([])


def flags_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Give the flags that make a run what it is, as JSON takes them."""
    values = {name: getattr(arguments, name) for name in RUN_FLAGS}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def take_flags(
    arguments: argparse.Namespace, header: Mapping[str, Any], names: Collection[str] = RUN_FLAGS
) -> None:
    """Fill the flags that were not given with those of an earlier run."""
    defaults, kept = _defaults(), header.get("flags", {})
    given = {name for name in names if getattr(arguments, name) != getattr(defaults, name)}
    for group in _TOGETHER:
        if given & set(group):
            given |= set(group)
    for name in names:
        if name not in given and name in kept:
            value = kept[name]
            is_path = name in ("prompts", "trace", "json_schema") and value is not None
            setattr(arguments, name, Path(value) if is_path else value)


def plan_of(arguments: argparse.Namespace, *, vocab_size: int) -> Plan:
    """Make the plan. Raises ConfigError naming the flag that is wrong."""
    load = _load(arguments)
    metric: Metric = arguments.metric or default_metric(load)
    schema = _schema(arguments.json_schema)
    for name in ("requests", "max_tokens"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: at least 1")
    if arguments.answers < 0:
        raise ConfigError(f"--answers {arguments.answers}: 0 or more")
    return Plan(
        workload=_workload(arguments, vocab_size, schema),
        load=load,
        requests_per_leg=arguments.requests,
        precision=_precision(arguments),
        metric=metric,
        seed=arguments.seed,
        num_same=arguments.answers,
        ladder=rates_of(arguments.ladder),
        allowed=tuple(arguments.allow),
        json_schema=schema,
    )


def _schema(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--json-schema: cannot read {path}: {error}") from error
    try:
        SchemaCheck(text)
    except ConfigError as error:
        raise ConfigError(f"--json-schema {path}: {error}") from None
    return text


def _precision(arguments: argparse.Namespace) -> Precision:
    most = arguments.max_blocks
    try:
        return Precision(arguments.precision / 100, min(SELF_TEST_BLOCKS, most), most)
    except ValueError as error:
        raise ConfigError(f"--precision or --max-blocks: {error}") from None


def _workload(arguments: argparse.Namespace, vocab_size: int, schema: str) -> Workload:
    sampling = SamplingOverrides(
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        constraint=Constraint("json_schema", schema) if schema else None,
    )
    items: tuple[WorkItem, ...]
    if arguments.prompts is not None:
        items = read_prompts(arguments.prompts, max_tokens=arguments.max_tokens)
    else:
        shape = arguments.synthetic.split(",")
        if len(shape) != 2 or not all(part.strip().isdecimal() for part in shape):
            raise ConfigError(f"--synthetic {arguments.synthetic}: two numbers of tokens, IN,OUT")
        num_in, num_out = map(int, shape)
        items = synthetic(num_in, num_out, NUM_SYNTHETIC, vocab_size=vocab_size, seed=arguments.seed)
    # A grammar ends its output itself, whatever the end token is told to do.
    return Workload(items, fixed_length=not (arguments.natural or schema), sampling=sampling)


def _load(arguments: argparse.Namespace) -> Load:
    if arguments.rate is not None:
        return Load("poisson", rate=arguments.rate)
    if arguments.constant_rate is not None:
        return Load("constant", rate=arguments.constant_rate)
    if arguments.trace is not None:
        return Load("trace", trace=read_trace(arguments.trace))
    return Load("closed", concurrency=arguments.concurrency)


def rates_of(text: str | None) -> tuple[float, ...]:
    """Read --ladder. Raises ConfigError."""
    try:
        rates = tuple(float(part) for part in (text or "").split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"--ladder {text}: numbers of requests a second, separated by commas") from None
    if not all(0 < rate < float("inf") for rate in rates):
        raise ConfigError(f"--ladder {text}: each rate must be above 0")
    return rates


def slo_of(text: str | None) -> Slo:
    """Read --slo. Raises ConfigError."""
    limits: dict[str, float] = {}
    for part in (text or "").split(","):
        if not part.strip():
            continue
        name, _, value = part.partition("=")
        try:
            limit = float(value)
        except ValueError:
            limit = -1.0
        if name.strip() not in {"ttft", "tpot", "itl"} or not 0 < limit < float("inf"):
            raise ConfigError(f"--slo {part}: ttft, tpot or itl, an equals sign and seconds above 0")
        limits[f"{name.strip()}_s"] = limit
    return Slo(**limits)


def prices_of(text: str | None) -> tuple[float, float] | None:
    """Read --recommend. Raises ConfigError."""
    if text is None:
        return None
    try:
        a, b = (float(part) for part in text.split(","))
    except ValueError:
        a = b = -1.0
    if not (0 < a < float("inf") and 0 < b < float("inf")):
        raise ConfigError(f"--recommend {text}: two prices above 0, PRICE_A,PRICE_B")
    return a, b
