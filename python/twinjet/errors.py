"""What can go wrong, as exceptions that know neither gRPC nor an engine.

TwinjetError
├── InvalidRequest      the client's mistake; names each field and its allowed range
├── NotFound            no such model, adapter or request
├── AlreadyExists       a request id or adapter name that is taken
├── PermissionRefused   the caller may not do this
├── Unsupported         this model or engine lacks a capability
├── Overloaded          the queue is full or a quota is spent; says when to come back
├── Unavailable         loading, draining or dead; says when to come back
│   └── EngineDied      the engine's process or loop is gone
├── DeadlinePassed      the request's deadline passed
│   └── DeadlineUnreachable   it is predicted to pass before the request could be served
├── RequestAborted      an operator ended the request
├── RequestFailed       the engine could not finish this one request
│   └── NoAdmissibleToken   the request's own conditions contradict each other
└── ConfigError         the server's own settings are wrong
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class TwinjetError(Exception):
    """Base of all errors raised on purpose."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One field and what is wrong with it.

    field: path from the request message, proto names joined by dots ("sampling.top_p").
    message: what was wrong, the value, the allowed range; lower case, no full stop.
    """

    field: str
    message: str


class InvalidRequest(TwinjetError):
    """The client's mistake."""

    def __init__(self, violations: Sequence[Violation]) -> None:
        self.violations = tuple(violations)
        super().__init__("; ".join(f"{v.field}: {v.message}" for v in self.violations))

    @classmethod
    def of(cls, field: str, message: str) -> InvalidRequest:
        return cls([Violation(field, message)])


class NotFound(TwinjetError):
    """No such thing; kind is "model", "adapter" or "request"."""

    def __init__(self, kind: str, name: str, hint: str = "") -> None:
        self.kind = kind
        self.name = name
        super().__init__(f"no {kind} named {name!r}" + (f"; {hint}" if hint else ""))


class AlreadyExists(TwinjetError):
    """The name is taken; kind is "request" or "adapter"."""

    def __init__(self, kind: str, name: str) -> None:
        self.kind = kind
        self.name = name
        super().__init__(f"{kind} {name!r} exists already")


class PermissionRefused(TwinjetError):
    """The caller may not do this."""


class Unsupported(TwinjetError):
    """The model or its engine lacks a capability; named as in proto, lower case, without the prefix."""

    def __init__(self, capability: str, detail: str = "") -> None:
        self.capability = capability
        super().__init__(f"this model does not support {capability}" + (f": {detail}" if detail else ""))


@dataclass(frozen=True, slots=True)
class QuotaExcess:
    """A quota that is spent: its subject ("tenant:acme") and what it allows."""

    subject: str
    description: str


class Overloaded(TwinjetError):
    """The queue is full or a quota is spent. retry_after_s: seconds until a retry makes sense."""

    def __init__(self, message: str, *, retry_after_s: float, quotas: Sequence[QuotaExcess] = ()) -> None:
        self.retry_after_s = retry_after_s
        self.quotas = tuple(quotas)
        super().__init__(message)


class Unavailable(TwinjetError):
    """Not at present. reason: a stable upper-case word. retry_after_s: seconds until a retry makes sense."""

    def __init__(self, message: str, *, reason: str, retry_after_s: float) -> None:
        self.reason = reason
        self.retry_after_s = retry_after_s
        super().__init__(message)


class EngineDied(Unavailable):
    """The engine's process or loop is gone; every running request of it is lost.

    was_running: the engine had this very request, which may be what ended it. The reason then is
    ENGINE_DIED_RUNNING and not ENGINE_DIED, so that nobody sends such a request again as it is.
    """

    def __init__(
        self, message: str = "the engine died", *, retry_after_s: float = 5.0, was_running: bool = False
    ) -> None:
        self.was_running = was_running
        reason = "ENGINE_DIED_RUNNING" if was_running else "ENGINE_DIED"
        super().__init__(message, reason=reason, retry_after_s=retry_after_s)


class PreconditionFailed(TwinjetError):
    """The server is not in the state that the call needs. reason: a stable upper-case word."""

    def __init__(self, message: str, *, reason: str) -> None:
        self.reason = reason
        super().__init__(message)


class SlowReader(TwinjetError):
    """The client reads too slowly; what waited for it was dropped."""


class DeadlinePassed(TwinjetError):
    """The request's deadline passed. reason: a stable upper-case word."""

    reason = "DEADLINE_PASSED"


class DeadlineUnreachable(DeadlinePassed):
    """The deadline is predicted to pass before the request could be served; nothing was begun."""

    reason = "DEADLINE_UNREACHABLE"


class RequestAborted(TwinjetError):
    """An operator ended the request."""


class RequestFailed(TwinjetError):
    """The engine could not finish this one request; others go on. reason: a stable upper-case word."""

    def __init__(self, message: str, *, reason: str = "REQUEST_FAILED") -> None:
        self.reason = reason
        super().__init__(message)


class NoAdmissibleToken(RequestFailed):
    """The request's masks, grammar, stops and bad words leave no token, or take too long; only the run could show it."""

    def __init__(self) -> None:
        super().__init__(
            "no token is admissible under the request's masks, grammar and bad words, or the grammar is too ambiguous "
            "to be followed; loosen one of them",
            reason="NO_ADMISSIBLE_TOKEN",
        )


class ConfigError(TwinjetError):
    """The server's own settings are wrong. The message names the setting and what to do."""
