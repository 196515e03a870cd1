"""vLLM's structured-output backend that takes grammars which the server has compiled; imports vLLM.

Runs in the engine's process. The backend is vLLM's own seam: `StructuredOutputManager` makes one at the first
constrained request unless it has one. A request of ours has a `GrammarNote` for a grammar; any other one, which does
not come through the server, is compiled as vLLM does it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import xgrammar
from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.backend_types import StructuredOutputBackend, StructuredOutputOptions
from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend, XgrammarGrammar

from twinjet.engines.vllm.fields import GrammarNote
from twinjet.grammar.effort import Effort
from twinjet.grammar.handle import end_tokens, load_grammar

logger = init_logger(__name__)


@dataclass
class WatchedGrammar(XgrammarGrammar):  # type: ignore[misc]
    """vLLM's match of a grammar, which ends its request where it takes too long; see grammar.effort."""

    effort: Effort = field(default_factory=Effort, init=False, repr=False)

    def fill_bitmask(self, bitmask: torch.Tensor, idx: int) -> None:
        """Write the mask; where nothing is left of the effort, one that allows no token."""
        if self.effort.is_spent():
            bitmask[idx].fill_(0)
            return
        self.effort.allow_mask()
        with self.effort.counted():
            super().fill_bitmask(bitmask, idx)

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        """Go on by tokens; False, which ends the request, also where that took too long."""
        if self.effort.is_spent():
            return False
        with self.effort.counted():
            is_accepted: bool = super().accept_tokens(request_id, tokens)
        if self.effort.is_spent():
            logger.warning("request %s ends: its grammar takes too long to match", request_id)
        return is_accepted and not self.effort.is_spent()


class PreparedGrammars(StructuredOutputBackend):  # type: ignore[misc]
    """Reads compiled grammars from the server's files."""

    def compile_grammar(
        self,
        request_type: StructuredOutputOptions,
        grammar_spec: str,
        stop_token_ids: set[int] | None = None,
    ) -> XgrammarGrammar:
        """Begin a match of a prepared grammar. Raises OSError if its file is gone."""
        if not GrammarNote.is_one(grammar_spec):
            return self._stock().compile_grammar(request_type, grammar_spec, stop_token_ids)
        note = GrammarNote.decode(grammar_spec)
        compiled = load_grammar(note.path, note.vocabulary_path)
        speculation = self.vllm_config.speculative_config
        matcher = xgrammar.GrammarMatcher(
            compiled,
            override_stop_tokens=end_tokens(note.vocabulary_path, note.end_token_ids, note.stop_token_ids),
            max_rollback_tokens=0 if speculation is None else speculation.num_speculative_tokens,
        )
        return WatchedGrammar(matcher=matcher, vocab_size=self.vocab_size, ctx=compiled)

    def _stock(self) -> XgrammarBackend:
        if not hasattr(self, "_stock_backend"):
            self._stock_backend = XgrammarBackend(self.vllm_config, self.tokenizer, self.vocab_size)
        return self._stock_backend

    def allocate_token_bitmask(self, max_num_seqs: int) -> Any:
        return xgrammar.allocate_token_bitmask(max_num_seqs, self.vocab_size)

    def destroy(self) -> None:
        """Nothing is held."""


def install(manager: StructuredOutputManager) -> None:
    """Give vLLM's manager this backend before it makes one itself."""
    config = manager.vllm_config
    manager.backend = PreparedGrammars(
        config, getattr(manager, "tokenizer", None), config.model_config.get_vocab_size()
    )


def make_scheduler(vllm_config: Any, **kwargs: Any) -> Scheduler | AsyncScheduler:
    """Make vLLM's own scheduler as the engine's configuration asks for it, with this backend."""
    kind = AsyncScheduler if vllm_config.scheduler_config.async_scheduling else Scheduler
    made = kind(vllm_config=vllm_config, **kwargs)
    install(made.structured_output_manager)
    return made
