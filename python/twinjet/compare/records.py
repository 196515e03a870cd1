"""Raw data of a comparison: one line of JSON a fact, appended as it happens, enough to judge again without a server."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

from twinjet.errors import ConfigError

FORMAT = 1
Arm = Literal["a", "b"]
Phase = Literal["sameness", "self", "main", "ladder"]


@dataclass(frozen=True, slots=True)
class TokenChances:
    """What one side gave its token at one place, natural logarithms. rivals: token ids and their logprobs, best first."""

    logprob: float
    rivals: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Record:
    """One request. Times in seconds on the driver's clock; intended_at is when it should have been sent.

    leg: 0 to 3, its place in A B B A. token_times: arrival of each token, one entry a token; tokens that came in one
    message share a time. error: "" if it ended well. rate: offered requests a second in the ladder, else 0.
    text and chances (one entry a token, or empty): kept in the phase "sameness" alone.
    num_prompt_tokens: 0 is not known.
    """

    phase: Phase
    block: int
    leg: int
    arm: Arm
    index: int
    intended_at: float
    sent_at: float
    ended_at: float
    token_times: tuple[float, ...] = ()
    token_ids: tuple[int, ...] = ()
    reason: str = ""
    deployment: str = ""
    error: str = ""
    rate: float = 0.0
    text: str = ""
    chances: tuple[TokenChances, ...] = ()
    num_prompt_tokens: int = 0

    @property
    def e2e_s(self) -> float:
        """From the intended start to the end."""
        return self.ended_at - self.intended_at

    @property
    def ttft_s(self) -> float | None:
        """From the intended start to the first token; None without a token."""
        return self.token_times[0] - self.intended_at if self.token_times else None

    @property
    def tpot_s(self) -> float | None:
        """Mean time of a token after the first; None with fewer than two."""
        if len(self.token_times) < 2:
            return None
        return (self.token_times[-1] - self.token_times[0]) / (len(self.token_times) - 1)

    def itl_s(self) -> Iterator[float]:
        """Give each gap between tokens; 0 within a message."""
        for before, after in zip(self.token_times, self.token_times[1:], strict=False):
            yield after - before

    @property
    def lag_s(self) -> float:
        """How late the client itself sent it."""
        return self.sent_at - self.intended_at


@dataclass(frozen=True, slots=True)
class LegFacts:
    """One leg of a block: its length and what the client used. cpu_s: the client's own processor time."""

    phase: Phase
    block: int
    leg: int
    arm: Arm
    seconds: float
    cpu_s: float
    rate: float = 0.0


@dataclass(slots=True)
class RunData:
    """A whole run as read back. header: settings, digest of the requests, versions, machine; see driver.

    Its records are not in its repr: asyncio.run writes out what it returns where it looks at the signal handlers, and
    all records take seconds.
    """

    header: Mapping[str, Any] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list, repr=False)
    legs: list[LegFacts] = field(default_factory=list, repr=False)

    def complete_blocks(self, phase: Phase, rate: float = 0.0) -> list[int]:
        """Give the blocks of a phase whose four legs were all finished."""
        seen: dict[int, set[int]] = {}
        for leg in self.legs:
            if leg.phase == phase and leg.rate == rate:
                seen.setdefault(leg.block, set()).add(leg.leg)
        return sorted(block for block, legs in seen.items() if legs == {0, 1, 2, 3})

    def forget_partial_blocks(self) -> None:
        """Leave out the legs of blocks that are not whole: a block is run anew as one, its legs close together."""
        whole: dict[tuple[Phase, float], set[int]] = {}
        for leg in self.legs:
            if (key := (leg.phase, leg.rate)) not in whole:
                whole[key] = set(self.complete_blocks(*key))
        self.legs = [leg for leg in self.legs if leg.block in whole[leg.phase, leg.rate]]
        self.records = [r for r in self.records if r.block in whole.get((r.phase, r.rate), ())]


def _chances(value: Mapping[str, Any]) -> TokenChances:
    return TokenChances(value["logprob"], tuple((int(token), logprob) for token, logprob in value["rivals"]))


class Journal:
    """Appends to a file of JSON Lines; each leg is flushed when it is complete, so Ctrl-C loses at most one."""

    def __init__(self, path: Path | None) -> None:
        self._file: TextIO | None = None if path is None else path.open("a", encoding="utf-8")

    def header(self, header: Mapping[str, Any]) -> None:
        """Write what the run is; once, first."""
        self._write([{"type": "header", "format": FORMAT, **header}])

    def leg(self, facts: LegFacts, records: Iterable[Record]) -> None:
        """Write a finished leg and its requests."""
        if self._file is None:
            return
        self._write(
            [*({"type": "request"} | asdict(record) for record in records), {"type": "leg"} | asdict(facts)]
        )

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _write(self, lines: Iterable[Mapping[str, Any]]) -> None:
        if self._file is not None:
            self._file.writelines(json.dumps(line) + "\n" for line in lines)
            self._file.flush()


def read_run(path: Path) -> RunData:
    """Read a run back. A last line that was cut off is left out, as are requests of a leg that was not finished.

    Of a leg that was run again, after an end in the middle of its block, the last one counts. Raises ConfigError naming the line that is wrong.
    """
    data = RunData()
    pending: list[Record] = []
    legs: dict[tuple[Phase, int, int, float], tuple[LegFacts, list[Record]]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
            kind = value.pop("type")
            if kind == "header":
                if value.pop("format") != FORMAT:
                    raise ValueError("a format that this version does not know")
                data.header = value
            elif kind == "request":
                value["token_times"] = tuple(value["token_times"])
                value["token_ids"] = tuple(value["token_ids"])
                value["chances"] = tuple(map(_chances, value.get("chances", ())))
                pending.append(Record(**value))
            elif kind == "leg":
                leg = LegFacts(**value)
                key = (leg.phase, leg.block, leg.leg, leg.rate)
                legs.pop(key, None)
                legs[key] = (leg, pending)
                pending = []
            else:
                raise ValueError(f"type {kind!r} is not known")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number == len(lines):
                break
            raise ConfigError(f"{path}:{number}: not a line of a comparison: {error}") from None
    data.legs = [leg for leg, _ in legs.values()]
    data.records = [record for _, records in legs.values() for record in records]
    if not data.header:
        raise ConfigError(f"{path} is not the record of a comparison: it has no header")
    return data
