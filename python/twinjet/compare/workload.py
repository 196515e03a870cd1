"""What is sent and when: the request sequence, the same bytes for both arms, and arrival times. Pure."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from twinjet.errors import ConfigError
from twinjet.request import SamplingOverrides


@dataclass(frozen=True, slots=True)
class WorkItem:
    """One request of the sequence. prompt: text, or token ids. max_tokens: the output's length or its most.

    index: its place in the sequence, by which answers are paired.
    """

    index: int
    prompt: str | tuple[int, ...]
    max_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class Workload:
    """The request sequence. fixed_length: outputs have exactly max_tokens tokens (end tokens ignored)."""

    items: tuple[WorkItem, ...]
    fixed_length: bool = True
    sampling: SamplingOverrides = field(default_factory=SamplingOverrides)

    @property
    def digest(self) -> str:
        """SHA-256 over everything that is sent, hexadecimal: equal digests mean equal requests."""
        total = hashlib.sha256()
        shared = {name: getattr(self.sampling, name) for name in SamplingOverrides.__slots__}
        shared["logit_bias"] = sorted(self.sampling.logit_bias.items())
        total.update(json.dumps([self.fixed_length, shared], sort_keys=True, default=str).encode())
        for item in self.items:
            total.update(json.dumps([item.index, item.prompt, item.max_tokens, item.seed]).encode() + b"\n")
        return total.hexdigest()

    def sampling_of(self, item: WorkItem) -> SamplingOverrides:
        """Give the sampling of one request: the workload's, with the item's seed and length."""
        values = {name: getattr(self.sampling, name) for name in SamplingOverrides.__slots__}
        values |= {"seed": item.seed, "max_tokens": item.max_tokens}
        if self.fixed_length:
            values["ignore_eos"] = True
        return SamplingOverrides(**values)


def synthetic(
    num_prompt_tokens: int, num_output_tokens: int, count: int, *, vocab_size: int, seed: int = 0
) -> tuple[WorkItem, ...]:
    """Give requests of random token ids, all of one shape. Raises ConfigError for sizes below 1."""
    for name, value in (("prompt", num_prompt_tokens), ("output", num_output_tokens), ("count", count)):
        if value < 1:
            raise ConfigError(f"synthetic requests: {name} of {value}; at least 1 is needed")
    rng = random.Random(seed)
    return tuple(
        WorkItem(i, tuple(rng.randrange(vocab_size) for _ in range(num_prompt_tokens)), num_output_tokens, i)
        for i in range(count)
    )


def read_prompts(path: Path, *, max_tokens: int) -> tuple[WorkItem, ...]:
    """Read prompts: JSON Lines of {"text": ..} or {"token_ids": [..]} with an optional "max_tokens", or plain lines.

    Raises ConfigError naming the line that cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    is_json = path.suffix in {".jsonl", ".json"}
    items: list[WorkItem] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        prompt, length = _parse(line, where, max_tokens) if is_json else (line, max_tokens)
        items.append(WorkItem(len(items), prompt, length, len(items)))
    if not items:
        raise ConfigError(f"{path} holds no prompts")
    return tuple(items)


def _parse(line: str, where: str, max_tokens: int) -> tuple[str | tuple[int, ...], int]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON: {error}") from None
    if not isinstance(value, dict) or ("text" in value) == ("token_ids" in value):
        raise ConfigError(f'{where}: an object with either "text" or "token_ids" is needed')
    length = value.get("max_tokens", max_tokens)
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise ConfigError(f"{where}: max_tokens is {length!r}; a whole number of at least 1 is needed")
    if "text" in value:
        if not isinstance(value["text"], str) or not value["text"]:
            raise ConfigError(f"{where}: text must be a string that is not empty")
        return value["text"], length
    ids = value["token_ids"]
    if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
        raise ConfigError(f"{where}: token_ids must be a list of whole numbers from 0")
    return tuple(ids), length


@dataclass(frozen=True, slots=True)
class Load:
    """How requests arrive. closed: `concurrency` at a time, each started when one ends. The others are open
    loops: arrivals are fixed beforehand, however slow the answers, at `rate` a second or as a trace says.

    trace: seconds from the start, ascending, for kind "trace"; repeated from its end where it is too short.
    """

    kind: Literal["closed", "poisson", "constant", "trace"]
    concurrency: int = 8
    rate: float = 0.0
    trace: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind == "closed" and self.concurrency < 1:
            raise ConfigError(f"a concurrency of {self.concurrency}; at least 1 is needed")
        if self.kind in {"poisson", "constant"} and not 0 < self.rate < float("inf"):
            raise ConfigError(f"a rate of {self.rate:g} requests/s; a number above 0 is needed")
        if self.kind == "trace" and (
            not self.trace or self.trace[0] < 0 or list(self.trace) != sorted(self.trace)
        ):
            raise ConfigError("a trace must be ascending seconds from 0, at least one")

    @property
    def is_open(self) -> bool:
        return self.kind != "closed"

    def arrivals(self, count: int, *, seed: int) -> Sequence[float]:
        """Give intended starts in seconds from the segment's begin; all 0 for a closed loop."""
        match self.kind:
            case "closed":
                return [0.0] * count
            case "constant":
                return [i / self.rate for i in range(count)]
            case "poisson":
                rng = random.Random(seed)
                at, times = 0.0, []
                for _ in range(count):
                    at += rng.expovariate(self.rate)
                    times.append(at)
                return times
            case "trace":
                period = self.trace[-1] + (self.trace[-1] / len(self.trace) or 1.0)
                return [self.trace[i % len(self.trace)] + i // len(self.trace) * period for i in range(count)]


def read_trace(path: Path) -> tuple[float, ...]:
    """Read a trace: one number of seconds a line. Raises ConfigError naming the line that is not one."""
    times = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            times.append(float(line))
        except ValueError:
            raise ConfigError(f"{path}:{number}: {line.strip()!r} is not a number of seconds") from None
    return tuple(times)
