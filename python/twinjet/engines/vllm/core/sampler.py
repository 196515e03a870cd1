"""The V1 model runner's sampler replaced by ours, in the engine's process; imports vLLM.

A batch with anything that ours does not cover goes to vLLM's sampler, and why is counted. The grammar's bitmask
comes with the draw and not through the runner, which would write it into the logits: log probabilities are those
before the mask.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import BUILTIN_LOGITS_PROCESSORS
from vllm.v1.sample.sampler import Sampler as StockSampler

from twinjet import _core
from twinjet.engines.vllm.core.requests import RequestTable
from twinjet.sampling import STATUS_NAN, STATUS_NO_TOKEN, Request, Sampler
from twinjet.sampling.cuda import has_cuda

_MODES = {"raw_logprobs": "raw", "processed_logprobs": "processed"}


class Drawing:
    """What both runners share: the native sampler, its requests, its counters."""

    def __init__(self, vocab_size: int, logprobs_mode: str) -> None:
        self.native = Sampler()
        self.table = RequestTable(vocab_size)
        self.counters: Counter[str] = Counter()
        self.has_empty_rows = False
        self.logprobs_mode = logprobs_mode
        self.target = self.native.target

    def reason(self, logits: torch.Tensor, num_logprobs: int | None) -> str:
        """Say why no batch like this is ours, "" if it may be."""
        if logits.device.type != "cpu" and not (logits.is_cuda and has_cuda()):
            return "device"
        if logits.is_cuda and num_logprobs is not None and num_logprobs > _core.CUDA_MAX_LOGPROBS:
            return "more_logprobs_than_on_cuda"
        if num_logprobs is not None and self.logprobs_mode not in _MODES:
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
        """Draw one token for each row: int32 [rows, 1] on the logits' device, -1 where there is none."""
        result = self.native.sample(
            logits,
            requests,
            bitmask=bitmask,
            bitmask_rows=bitmask_rows,
            advance=advance,
            num_logprobs=num_logprobs,
            logprobs_mode=_MODES.get(self.logprobs_mode, "raw"),  # type: ignore[arg-type]
        )
        self.target = "cuda" if logits.is_cuda else self.native.target
        self.counters["steps"] += 1
        self.counters["rows"] += len(requests)
        status = np.asarray(result.status)
        self.has_empty_rows = False
        if status.any():
            self.counters["rows_with_nan"] += int(np.count_nonzero(status & STATUS_NAN))
            empty = int(np.count_nonzero(status & STATUS_NO_TOKEN))
            self.counters["rows_without_token"] += empty
            self.has_empty_rows = empty > 0
        tokens = torch.as_tensor(result.token_ids, device=logits.device).unsqueeze(-1)
        if result.logprobs is None:
            return tokens, None
        found = result.logprobs
        tensors = LogprobsTensors(
            # Ids are turned into text also for a row that has no token and ends.
            torch.as_tensor(found.token_ids, device=logits.device).clamp_(min=0),
            torch.as_tensor(found.logprobs, device=logits.device),
            torch.as_tensor(found.ranks, device=logits.device),
        )
        return tokens, tensors

    def give_up(self, reason: str) -> None:
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
        self.drawing = Drawing(runner.model_config.get_vocab_size(), stock.logprobs_mode)
        self._grammar: Any = None

    @contextlib.contextmanager
    def with_grammar(self, grammar: Any) -> Iterator[None]:
        """Keep a step's grammar masks for the draw; vLLM's GrammarOutput, without speculative tokens."""
        self._grammar = grammar
        try:
            yield
        finally:
            self._grammar = None

    def _masks(self) -> tuple[npt.NDArray[np.int32] | None, npt.NDArray[np.int32] | None]:
        """The step's masks, and which of them is each row's."""
        if self._grammar is None:
            return None, None
        places = {name: i for i, name in enumerate(self._grammar.structured_output_request_ids)}
        rows = [places.get(name, -1) for name in self.runner.input_batch.req_ids]
        return self._grammar.grammar_bitmask, np.asarray(rows, dtype=np.int32)

    def apply_logits_processors(self, logits: torch.Tensor, *args: Any) -> torch.Tensor:
        """Put the grammar's mask before vLLM's own processors, after it has read the raw logprobs."""
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
        requests: list[Request] = []
        reason = self._reason(logits, sampling_metadata, predict_bonus_token, logprobs_mode_override)
        if not reason:
            reason = self._collect(requests)
        if reason:
            if reason != "dummy_run":
                drawing.give_up(reason)
            return super().forward(logits, sampling_metadata, predict_bonus_token, logprobs_mode_override)
        # The token of a row whose prompt is not done yet is thrown away by the runner.
        advance = ~self.runner.discard_request_mask.np[: len(requests)]
        bitmask, rows = self._masks()
        tokens, logprobs = drawing.draw(
            logits, requests, advance, sampling_metadata.max_num_logprobs, bitmask, rows
        )
        if drawing.has_empty_rows:
            self._end_empty_rows(tokens, logits.shape[1])
        return SamplerOutput(sampled_token_ids=tokens, logprobs_tensors=logprobs)

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
        return self.drawing.reason(logits, metadata.max_num_logprobs)

    def _collect(self, requests: list[Request]) -> str:
        states = self.runner.requests
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
