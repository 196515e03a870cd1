"""The seam between our front end and a running vLLM engine core.

CoreLink (core_link.py) speaks the core's own protocol and needs no vLLM here; StockLink (stock.py) goes through
AsyncLLM, for versions and features that the first was not tested with.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from twinjet.engines.base import Run
from twinjet.request import EngineRequest
from twinjet.sampling.bad_text import BadTextSettings


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter as vLLM names it: number is its id there, at least 1."""

    name: str
    number: int
    path: str


class Link(Protocol):
    """One engine core. All but shutdown() are called from one loop."""

    def watch(self, loop: asyncio.AbstractEventLoop, on_death: Callable[[str], None]) -> None:
        """Begin to take steps; on_death is called once, with why, when no more can come."""
        ...

    def submit(
        self,
        request: EngineRequest,
        run: Run,
        adapter: Adapter | None,
        *,
        native: bool,
        bad_text: BadTextSettings | None,
    ) -> None:
        """Hand over a request, each output as one of its own. native: our sampler draws it, without bad_text.

        Raises InvalidRequest for what the engine refuses and EngineDied, or fails the run with one later.
        """
        ...

    def flush(self) -> None:
        """Send what waits for the end of the loop's turn; on_death may be called."""
        ...

    def cancel(self, request_id: str, output_index: int | None = None) -> None:
        """Stop and forget an output, or the request; nothing if it is unknown."""
        ...

    async def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the engine core. Raises EngineDied, or Exception with what the method raised."""
        ...

    async def add_adapter(self, adapter: Adapter) -> None:
        """Load an adapter. Raises Exception with what the worker raised."""
        ...

    async def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes; False if running requests hold some."""
        ...

    async def embed(
        self, request_id: str, prompt_token_ids: Sequence[int], dimensions: int | None
    ) -> Sequence[float]:
        """Give the vector of one input; see EmbeddingEngine.embed."""
        ...

    def shutdown(self) -> None:
        """Let go of the engine and its sockets; blocks. The caller ends the processes."""
        ...
