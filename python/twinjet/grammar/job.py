"""A job for a grammar worker, as the server and the worker both know it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Job:
    """kind, value, choices: as Constraint. vocabulary: its file, "" to check only. target: file to write.

    is_compact: JSON without white space. text: for kind "verify" what is checked against the schema `value`. is_exact: text holds nothing else.
    """

    kind: str
    value: str = ""
    choices: tuple[str, ...] = ()
    vocabulary: str = ""
    target: str = ""
    is_compact: bool = False
    text: str = ""
    is_exact: bool = True

    @staticmethod
    def of(fields: dict[str, Any]) -> Job:
        """Make one from what dataclasses.asdict gave, perhaps by way of JSON."""
        return Job(**{**fields, "choices": tuple(fields["choices"])})
