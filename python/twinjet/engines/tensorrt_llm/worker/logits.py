"""Our sampler as TensorRT-LLM's per-request logits processor.

The engine calls it once per step with the request's row of logits, in place. It draws the token and leaves
only that token admissible (0 there, -inf elsewhere), so that the engine's own sampler must pick it.

Traps: it runs in the engine's worker processes, one copy per tensor-parallel rank, so it is picklable and a
pure function of what it is given. The token list it is shown lags one token behind with the overlap
scheduler, so it keeps its own sequence and counts its calls. After a sequence has ended it may be called once
more, for a token that is thrown away. An exception would end the engine: none leaves __call__.

On a GPU the call does not wait: the token is drawn and forced on the device, a thread of the worker finishes
the draw (bookkeeping, reports) when the token has arrived, and the next call waits for that.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from twinjet.engines.tensorrt_llm.worker import device_draw
from twinjet.engines.tensorrt_llm.worker.grammar import GrammarHandle, Matcher
from twinjet.engines.tensorrt_llm.worker.reports import (
    TokenReport,
    encode_fault,
    encode_target,
    encode_token,
    reporter,
)

if TYPE_CHECKING:
    from twinjet.sampling import Request, Sampler, SampleResult
    from twinjet.sampling.bad_text import BadTextSettings

log = logging.getLogger(__name__)

LOGPROB_FLOOR = -9999.0
MAX_LAG = 1
"""Tokens by which the shown list may lag behind: 1 with the overlap scheduler, 0 without."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawSettings:
    """What a draw needs besides the logits; ranges as twinjet.request.Sampling.

    vocab_size: ids below it can be drawn; rows may be wider (padding for tensor parallelism).
    end_token_ids: ids that end the output; min_tokens holds them back. fault_token_id: forced after a fault.
    num_logprobs: None for no logprobs; then only tokens that end the output are reported, so that the server
    can tell a drawn end from one that a fault has forced. tells_target: report what draws here. drawn_token_ids: the
    output's beginning, which another engine has drawn.
    """

    key: int
    report_path: str
    vocab_size: int
    num_prompt_tokens: int
    output_index: int
    seed: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    logit_bias: Mapping[int, float]
    allowed_token_ids: tuple[int, ...]
    bad_text: BadTextSettings | None
    min_tokens: int
    max_tokens: int
    end_token_ids: tuple[int, ...]
    fault_token_id: int
    num_logprobs: int | None
    grammar: GrammarHandle | None = None
    tells_target: bool = False
    drawn_token_ids: tuple[int, ...] = ()


class DrawFault(Exception):
    """No token can be drawn for this request; the text says why."""


@dataclass(slots=True)
class _State:
    request: Request
    matcher: Matcher | None
    tokens: list[int] = field(default_factory=list)


class DrawProcessor:
    """One output's logits processor. Pickles as its settings; its state begins anew in each process."""

    def __init__(self, settings: DrawSettings) -> None:
        self.settings = settings
        self._state: _State | None = None
        self._fault: str | None = None
        self._finishing: Future[bool] | None = None

    def __reduce__(self) -> tuple[type[DrawProcessor], tuple[DrawSettings]]:
        return DrawProcessor, (self.settings,)

    def __call__(
        self,
        req_id: int,
        logits: Any,
        token_ids: list[list[int]],
        stream_ptr: int | None,
        client_id: int | None,
    ) -> None:
        """Draw from logits [1, 1, vocabulary] and force the token, in place.

        token_ids: one list, prompt and output tokens so far, the last one possibly missing. req_id and
        client_id are the engine's and say nothing here; stream_ptr is None in the PyTorch backend.
        """
        if self._finishing is not None:
            self._finishing.result()
            self._finishing = None
        if self._fault is None and self._guarded(lambda: self._step(logits, token_ids)):
            return
        # A device that failed fails here too: then the report alone ends the request.
        self._guarded(lambda: _force(logits, self.settings.fault_token_id))

    def _guarded(self, action: Callable[[], None]) -> bool:
        """Do it; report a failure as the request's fault and return False."""
        try:
            action()
        except DrawFault as fault:
            self._report_fault(str(fault))
            return False
        except Exception as error:
            log.exception("the sampler failed for one request")
            self._report_fault(f"{type(error).__name__}: {error}")
            return False
        return True

    def _step(self, logits: Any, token_ids: list[list[int]]) -> None:
        if len(token_ids) != 1 or logits.shape[0] != 1:
            raise DrawFault(f"{len(token_ids)} sequences in one row of logits; beam search is not possible")
        row = logits.reshape(-1)[: self.settings.vocab_size]
        is_on_device = device_draw.can_draw(row, self.settings.num_logprobs)
        if self._state is None:
            self._state = self._begin(token_ids[0])
            self._report_target(is_on_device, is_copied=row.is_cuda and not is_on_device)
        state = self._state
        self._check_sequence(state, token_ids[0])
        mask = None if state.matcher is None else state.matcher.bitmask()
        if is_on_device:
            drawn = device_draw.draw(row, state.request, mask, self.settings.num_logprobs)
            device_draw.force(logits, drawn.token_id, self.settings.fault_token_id)
            self._finishing = _finisher().submit(
                self._guarded, lambda: self._finish(state, drawn.result(), append=True)
            )
            return
        result = _sampler().sample(
            row.float().cpu() if row.is_cuda else row,
            [state.request],
            bitmask=mask,
            num_logprobs=self.settings.num_logprobs,
        )
        self._finish(state, result, append=False)
        _force(logits, state.tokens[-1])

    def _finish(self, state: _State, result: SampleResult, *, append: bool) -> None:
        """Take a drawn token into the sequence, and report it where the server needs that."""
        token = int(result.token_ids[0])
        if token < 0:
            raise DrawFault("no token is admissible")
        if state.matcher is not None and not state.matcher.accept(token):
            raise DrawFault(f"the grammar refused token {token}, which its own mask allows")
        if append:
            state.request.append(token)
        self._report_token(state, token, result)
        state.tokens.append(token)

    def _begin(self, shown: list[int]) -> _State:
        from twinjet.sampling import Request
        from twinjet.sampling.bad_text import bad_text

        s = self.settings
        prompt = shown[: s.num_prompt_tokens]
        if len(prompt) < s.num_prompt_tokens:
            raise DrawFault(f"shown {len(prompt)} of {s.num_prompt_tokens} prompt tokens")
        request = Request(
            s.vocab_size,
            temperature=s.temperature,
            top_k=s.top_k,
            top_p=s.top_p,
            min_p=s.min_p,
            repetition_penalty=s.repetition_penalty,
            frequency_penalty=s.frequency_penalty,
            presence_penalty=s.presence_penalty,
            seed=s.seed,
            output_index=s.output_index,
            prompt_token_ids=prompt,
            logit_bias=dict(s.logit_bias) or None,
            allowed_token_ids=s.allowed_token_ids or None,
            bad_text=None if s.bad_text is None else bad_text(s.bad_text),
            min_tokens=s.min_tokens,
            stop_token_ids=s.end_token_ids,
        )
        state = _State(request, None if s.grammar is None else s.grammar.matcher())
        for token in s.drawn_token_ids:
            if state.matcher is not None and not state.matcher.accept(token):
                raise DrawFault(f"the grammar refuses token {token}, with which the output begins")
            request.append(token)
            state.tokens.append(token)
        return state

    def _check_sequence(self, state: _State, shown: list[int]) -> None:
        """Compare what the engine shows with our own sequence; a difference must not go on in silence."""
        num_shown = len(shown) - self.settings.num_prompt_tokens
        if not 0 <= len(state.tokens) - num_shown <= MAX_LAG:
            raise DrawFault(
                f"the engine shows {num_shown} output tokens where {len(state.tokens)} were drawn"
            )
        if num_shown and shown[-1] != state.tokens[num_shown - 1]:
            raise DrawFault(
                f"the engine kept token {shown[-1]} where {state.tokens[num_shown - 1]} was drawn"
            )

    def _report_token(self, state: _State, token: int, result: SampleResult) -> None:
        position = len(state.tokens)
        is_last = token in self.settings.end_token_ids or position + 1 == self.settings.max_tokens
        if result.logprobs is None and not is_last:
            return
        report = TokenReport(token, 0, ()) if result.logprobs is None else _report(result)
        reporter(self.settings.report_path).send(encode_token(self.settings.key, position, report))

    def _report_target(self, is_on_device: bool, *, is_copied: bool) -> None:
        if self.settings.tells_target or is_copied:
            target = device_draw.TARGET if is_on_device else _sampler().target
            reporter(self.settings.report_path).send(encode_target(self.settings.key, target))

    def _report_fault(self, message: str) -> None:
        if self._fault is not None:
            return
        self._fault = message
        position = 0 if self._state is None else len(self._state.tokens)
        reporter(self.settings.report_path).send(encode_fault(self.settings.key, position, message))


def _report(result: SampleResult) -> TokenReport:
    logprobs = result.logprobs
    assert logprobs is not None
    ids, values = logprobs.token_ids[0].tolist(), logprobs.logprobs[0].tolist()
    entries = tuple(
        (token_id, max(LOGPROB_FLOOR, value))
        for token_id, value in zip(ids, values, strict=True)
        if token_id >= 0
    )
    return TokenReport(int(result.token_ids[0]), int(logprobs.ranks[0]), entries)


def _force(logits: Any, token_id: int) -> None:
    logits.fill_(-math.inf)
    logits[..., token_id] = 0.0


@lru_cache(maxsize=1)
def _finisher() -> ThreadPoolExecutor:
    # One thread: draws end in the order in which they were started.
    return ThreadPoolExecutor(1, thread_name_prefix="twinjet draws")


@lru_cache(maxsize=1)
def _sampler() -> Sampler:
    from twinjet.sampling import Sampler

    # One row at a time: threads would cost more than they give.
    return Sampler(num_threads=1)
