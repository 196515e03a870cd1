"""The V1 model runner's sampler replaced by ours, in the engine's process; imports vLLM.

A batch with anything that ours does not cover goes to vLLM's sampler, and why is counted. The grammar's bitmask comes
with the draw and not through the runner, which would write it into the logits: log probabilities are those before the
mask. On a CPU the draw is done when `forward` returns; on a GPU it is under way, see device_drawing.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import BUILTIN_LOGITS_PROCESSORS
from vllm.v1.sample.sampler import Sampler as StockSampler
from vllm.v1.structured_output.utils import apply_grammar_bitmask

from twinjet.engines.vllm.core.device_drawing import (
    LOGPROBS_MODES,
    DeviceDrawing,
    GrammarMasks,
    Unread,
    can_draw_on,
)
from twinjet.engines.vllm.core.device_seats import DeviceSeats
from twinjet.engines.vllm.core.requests import RequestTable
from twinjet.engines.vllm.fields import EXTRA_KEY
from twinjet.sampling import STATUS_NAN, STATUS_NO_TOKEN, Request, Sampler


class Drawing:
    """Drawing on the CPU: the native sampler, its requests, its counters."""

    def __init__(self, vocab_size: int, logprobs_mode: str) -> None:
        self.native = Sampler()
        self.table = RequestTable(vocab_size)
        self.counters: Counter[str] = Counter()
        self.has_empty_rows = False
        self.logprobs_mode = logprobs_mode
        self.is_warming = False

    @property
    def target(self) -> str:
        return self.native.target

    def reason(self, logits: torch.Tensor, num_logprobs: int | None) -> str:
        """Say why no batch like this is ours, "" if it may be."""
        if logits.device.type != "cpu":
            return "device"
        if num_logprobs is not None and self.logprobs_mode not in LOGPROBS_MODES:
            return "logprobs_mode"
        return ""

    def draw(
        self,
        logits: torch.Tensor,
        requests: Sequence[Request],
        advance: Any,
        num_logprobs: int | None,
        bitmask: npt.NDArray[np.int32] | None = None,
        bitmask_rows: npt.NDArray[np.int32] | None = None,
    ) -> tuple[torch.Tensor, LogprobsTensors | None]:
        """Draw one token for each row: int32 [rows, 1], -1 where there is none."""
        result = self.native.sample(
            logits,
            requests,
            bitmask=bitmask,
            bitmask_rows=bitmask_rows,
            advance=advance,
            num_logprobs=num_logprobs,
            logprobs_mode=LOGPROBS_MODES.get(self.logprobs_mode, "raw"),  # type: ignore[arg-type]
        )
        self.counters["steps"] += 1
        self.counters["rows"] += len(requests)
        status = np.asarray(result.status)
        self.has_empty_rows = False
        if status.any():
            self.counters["rows_with_nan"] += int(np.count_nonzero(status & STATUS_NAN))
            empty = int(np.count_nonzero(status & STATUS_NO_TOKEN))
            self.counters["rows_without_token"] += empty
            self.has_empty_rows = empty > 0
        tokens = torch.as_tensor(result.token_ids).unsqueeze(-1)
        if result.logprobs is None:
            return tokens, None
        found = result.logprobs
        tensors = LogprobsTensors(
            # Ids are turned into text also for a row that has no token and ends.
            torch.as_tensor(found.token_ids).clamp_(min=0),
            torch.as_tensor(found.logprobs),
            torch.as_tensor(found.ranks),
        )
        return tokens, tensors

    def give_up(self, reason: str) -> None:
        """Count a step that vLLM's sampler draws."""
        if self.is_warming or reason == "dummy_run":
            return
        self.counters["stock_steps"] += 1
        self.counters[f"stock_steps.{reason}"] += 1


def _allowed(mask: npt.NDArray[np.int32], vocab_size: int) -> npt.NDArray[np.bool_]:
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    return bits[:vocab_size].astype(np.bool_)


class NativeSampler(StockSampler):  # type: ignore[misc]
    """Takes the place of the V1 runner's sampler."""

    def __init__(self, runner: Any, stock: StockSampler) -> None:
        super().__init__(stock.logprobs_mode, stock.use_fp64_gumbel)
        # A plain dict entry: a module would register the runner's own modules as ours.
        self.__dict__["runner"] = runner
        vocab_size = runner.model_config.get_vocab_size()
        self.drawing: Drawing | DeviceDrawing
        if can_draw_on(runner.device):
            max_rows = runner.scheduler_config.max_num_seqs
            self.drawing = DeviceDrawing(
                vocab_size,
                max_rows,
                stock.logprobs_mode,
                runner.device.index or 0,
                max_in_flight=runner.vllm_config.max_concurrent_batches,
            )
            self._seats = DeviceSeats(self.drawing)
        else:
            self.drawing = Drawing(vocab_size, stock.logprobs_mode)
        self._grammar: Any = None
        self._scheduled: Any = None

    @contextlib.contextmanager
    def with_grammar(self, grammar: Any, runner: Any) -> Iterator[None]:
        """Keep a step's grammar masks for the draw; vLLM's GrammarOutput, without speculative tokens."""
        self._grammar = grammar
        state = getattr(runner, "execute_model_state", None)
        self._scheduled = None if state is None else state.scheduler_output
        try:
            yield
        finally:
            self._grammar = self._scheduled = None

    def _masks(self) -> tuple[npt.NDArray[np.int32] | None, npt.NDArray[np.int32] | None]:
        """The step's masks, and which of them is each row's."""
        if self._grammar is None:
            return None, None
        places = {name: i for i, name in enumerate(self._grammar.structured_output_request_ids)}
        rows = [places.get(name, -1) for name in self.runner.input_batch.req_ids]
        return self._grammar.grammar_bitmask, np.asarray(rows, dtype=np.int32)

    def apply_logits_processors(self, logits: torch.Tensor, *args: Any) -> torch.Tensor:
        """Put the grammar's mask before vLLM's own processors, after it has read the raw logprobs."""
        if self._grammar is not None and logits.device.type != "cpu":
            apply_grammar_bitmask(self._scheduled, self._grammar, self.runner.input_batch, logits)
            return super().apply_logits_processors(logits, *args)
        bitmask, rows = self._masks()
        if bitmask is not None and rows is not None:
            for row in np.flatnonzero(rows >= 0).tolist():
                refused = torch.from_numpy(~_allowed(bitmask[rows[row]], logits.shape[1])).to(logits.device)
                logits[row].masked_fill_(refused, -torch.inf)
        return super().apply_logits_processors(logits, *args)

    def forward(
        self,
        logits: torch.Tensor,
        sampling_metadata: Any,
        predict_bonus_token: bool = False,
        logprobs_mode_override: Any = None,
    ) -> SamplerOutput:
        """Draw one token for each row of the batch; as vLLM's sampler."""
        drawing = self.drawing
        stock = super().forward
        reason = self._reason(logits, sampling_metadata, predict_bonus_token, logprobs_mode_override)

        def draw_stock(why: str) -> SamplerOutput:
            drawing.give_up(why)
            return stock(logits, sampling_metadata, predict_bonus_token, logprobs_mode_override)

        if isinstance(drawing, DeviceDrawing):
            return self._forward_on_device(drawing, logits, sampling_metadata, reason, draw_stock)
        requests: list[Request] = []
        reason = (
            reason or drawing.reason(logits, sampling_metadata.max_num_logprobs) or self._collect(requests)
        )
        if reason:
            if reason != "dummy_run":
                self._ban_text(drawing, logits)
            return draw_stock(reason)
        # The token of a row whose prompt is not done yet is thrown away by the runner.
        advance = ~self.runner.discard_request_mask.np[: len(requests)]
        bitmask, rows = self._masks()
        tokens, logprobs = drawing.draw(
            logits, requests, advance, sampling_metadata.max_num_logprobs, bitmask, rows
        )
        if drawing.has_empty_rows:
            self._end_empty_rows(tokens, logits.shape[1])
        return SamplerOutput(sampled_token_ids=tokens, logprobs_tensors=logprobs)

    def _forward_on_device(
        self,
        drawing: DeviceDrawing,
        logits: torch.Tensor,
        metadata: Any,
        reason: str,
        draw_stock: Callable[[str], SamplerOutput],
    ) -> SamplerOutput:
        if reason == "dummy_run":
            return draw_stock(reason)
        request_ids = self.runner.input_batch.req_ids
        seats = self._seats.find(request_ids, self.runner.requests)
        advances = ~self.runner.discard_request_mask.np[: len(seats)]
        reason = reason or drawing.reason(logits, seats, metadata.max_num_logprobs)
        if reason:
            drawing.ban_text(logits, seats)
            output = draw_stock(reason)
            if output.sampled_token_ids.shape == (len(seats), 1):
                drawing.follow(seats, advances, output.sampled_token_ids)
            return output
        grammar = None
        if self._grammar is not None:
            grammar = GrammarMasks(self._grammar, request_ids, logits.device)
        drawn = drawing.draw(
            logits, seats, advances, metadata.max_num_logprobs, list(request_ids), torch.int32, grammar
        )
        return SamplerOutput(sampled_token_ids=drawn.tokens, logprobs_tensors=drawn.logprobs)

    def forget(self, request_ids: Iterable[str]) -> None:
        """Drop what is kept of requests that have ended."""
        if isinstance(self.drawing, DeviceDrawing):
            self._seats.forget(request_ids)
        else:
            self.drawing.table.forget(request_ids)

    def take_unread(self) -> Unread | None:
        """Give, once, the last draw on a device, whose rows without a token the host must end."""
        return self.drawing.take_unread() if isinstance(self.drawing, DeviceDrawing) else None

    def _end_empty_rows(self, tokens: torch.Tensor, vocab_size: int) -> None:
        """Make the scheduler end the requests of rows that have no token.

        NO_TOKEN is a stop token of theirs. Where a grammar holds, it must see a token that it rejects.
        """
        bitmask, rows = self._masks()
        if bitmask is None or rows is None:
            return
        for row in (tokens[:, 0] < 0).nonzero().flatten().tolist():
            if rows[row] >= 0:
                refused = np.flatnonzero(~_allowed(bitmask[rows[row]], vocab_size))
                if len(refused):
                    tokens[row, 0] = int(refused[0])

    def _ban_text(self, drawing: Drawing, logits: torch.Tensor) -> None:
        """Mask what the requests' bad words rule out, of which vLLM's sampler knows nothing."""
        states = self.runner.requests
        for row, request_id in enumerate(self.runner.input_batch.req_ids):
            state = states[request_id]
            if "bad_text" not in (state.sampling_params.extra_args or {}).get(EXTRA_KEY, {}):
                continue
            found = drawing.table.get(
                request_id, state.sampling_params, state.prompt_token_ids, state.output_token_ids
            )
            if isinstance(found, str):
                drawing.counters["rows_with_bad_words_not_kept"] += 1
            else:
                logits[row, found.banned_token_ids().astype(np.int64)] = -torch.inf

    def _reason(
        self, logits: torch.Tensor, metadata: Any, predict_bonus_token: bool, mode_override: Any
    ) -> str:
        if logits.shape[0] != self.runner.input_batch.num_reqs:
            return "dummy_run"
        if predict_bonus_token or (metadata.spec_token_ids and any(metadata.spec_token_ids)):
            return "speculative_decoding"
        if mode_override is not None and mode_override != self.logprobs_mode:
            return "logprobs_mode"
        processors = metadata.logitsprocs
        for processor in [*processors.argmax_invariant, *processors.non_argmax_invariant]:
            if type(processor) not in BUILTIN_LOGITS_PROCESSORS:
                return "custom_logits_processor"
        return ""

    def _collect(self, requests: list[Request]) -> str:
        states = self.runner.requests
        assert isinstance(self.drawing, Drawing)
        table = self.drawing.table
        for request_id in self.runner.input_batch.req_ids:
            state = states[request_id]
            found = table.get(
                request_id, state.sampling_params, state.prompt_token_ids, state.output_token_ids
            )
            if isinstance(found, str):
                return found
            requests.append(found)
        return ""
