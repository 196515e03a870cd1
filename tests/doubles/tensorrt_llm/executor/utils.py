"""Stand-in for tensorrt_llm.executor.utils."""

from __future__ import annotations

from tensorrt_llm import _contract


class RequestError(RuntimeError):
    """One request failed."""


if _contract.has("engine_dead_error"):

    class EngineDeadError(RuntimeError):
        """The engine is dead, for pending and for new requests."""

        def __init__(self, root_cause: BaseException | None = None) -> None:
            cause = "" if root_cause is None else f": {type(root_cause).__name__}: {root_cause}"
            super().__init__(f"Engine has died{cause}")
            self.root_cause = root_cause
