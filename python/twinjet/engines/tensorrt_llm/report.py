"""The doctor's report: findings, for people and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["as recorded", "differs", "fails", "not tried"]


@dataclass(frozen=True, slots=True)
class Line:
    """One finding. seen: what is there. consequence: what Twinjet does about it, "" if nothing."""

    check: str
    verdict: Verdict
    seen: str
    consequence: str = ""

    def __str__(self) -> str:
        about = f"; {self.consequence}" if self.consequence else ""
        return f"{self.verdict:11} {self.check}: {self.seen}{about}"


@dataclass(frozen=True, slots=True)
class Report:
    """All findings on one installation."""

    installed: str
    recorded: str
    environment: Mapping[str, str]
    lines: Sequence[Line]

    @property
    def fails(self) -> bool:
        return any(line.verdict == "fails" for line in self.lines)

    def __str__(self) -> str:
        num = {v: sum(line.verdict == v for line in self.lines) for v in ("as recorded", "differs", "fails")}
        return "\n".join(
            [
                f"tensorrt_llm {self.installed} against the recorded contract of {self.recorded}",
                *(f"  {name}: {value}" for name, value in self.environment.items()),
                *(f"  {line}" for line in self.lines),
                f"{num['as recorded']} as recorded, {num['differs']} differ, {num['fails']} fail",
            ]
        )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)
