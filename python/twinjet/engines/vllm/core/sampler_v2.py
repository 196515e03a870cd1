"""The V2 model runner's sampler (CUDA) wrapped by ours, through its custom-sampler hook. Imports vLLM.

V2 steps ahead of the host. A request's seat is filled when the runner adds it, new or resumed, from the tokens
that the scheduler sent along; afterwards the device keeps it. A batch with a row that ours does not cover goes
to vLLM's sampler, and the seats of its other rows take over the tokens that it draws. So vLLM's sampler is kept up
to date, but only when a request enters, where that is all that changes it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from twinjet.engines.vllm.core.device_drawing import DeviceDrawing, GrammarMasks, Unread, can_draw_on


def hook_custom_sampler(
    runner_module: Any, vocab_size: int, device: torch.device, *, is_tested: bool
) -> None:
    """Let model states made from now on answer the V2 runner's custom_sampler call with ours.

    Args:
        runner_module: vllm.v1.worker.gpu.model_runner, where init_model_state is looked up.
        is_tested: compat.check_runner() passes.
    """
    original = runner_module.init_model_state

    def init_model_state(vllm_config: Any, *args: Any) -> Any:
        state = original(vllm_config, *args)
        theirs = state.custom_sampler
        if vllm_config.speculative_config is None and can_draw_on(device):
            max_rows = vllm_config.scheduler_config.max_num_seqs

            def custom_sampler(sampler: Any) -> Any:
                drawing = DeviceDrawing(
                    vocab_size,
                    max_rows,
                    sampler.logprobs_mode,
                    device.index or 0,
                    max_in_flight=vllm_config.max_concurrent_batches,
                )
                return (
                    NativeSamplerV2(
                        sampler,
                        drawing,
                        draws_none="custom_logits_processor" if has_custom_processors(sampler) else "",
                        is_lazy=is_tested and changes_with_requests_alone(sampler),
                    ),
                    None,
                )

            state.custom_sampler = lambda sampler: theirs(sampler) or custom_sampler(sampler)
        return state

    runner_module.init_model_state = init_model_state


def has_custom_processors(stock: Any) -> bool:
    """Tell whether a sampler of vLLM's has logits processors that are not its own."""
    from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
    from vllm.v1.worker.gpu.sample.logit_bias import LogitBiasState
    from vllm.v1.worker.gpu.sample.penalties import PenaltiesState

    own = (BadWordsState, LogitBiasState, PenaltiesState)
    return any(type(processor) not in own for processor in stock.logits_processors)


def changes_with_requests_alone(stock: Any) -> bool:
    """Tell whether only add_request() changes what a sampler of the tested vLLM stages for the device."""
    from vllm.v1.worker.gpu.sample.sampler import Sampler

    # What derives from vLLM's sampler has states of its own; custom processors are promised a call a step.
    return type(stock) is Sampler and not has_custom_processors(stock)


def _within_limits(params: Any) -> Any:
    """Copy parameters without the lists that vLLM's sampler bounds."""
    made = copy.copy(params)
    made.allowed_token_ids = made.logit_bias = None
    made.min_tokens = 0
    return made


class NativeSamplerV2:
    """Offers what the V2 runner calls on its sampler; everything but the drawing is vLLM's.

    Args:
        draws_none: why vLLM's sampler must draw every batch, "" if it need not.
        is_lazy: only add_request() changes what vLLM's sampler stages.

    Attributes:
        incoming: the scheduler's data of the requests that this step adds, by id; set before each step.
    """

    def __init__(
        self, stock: Any, drawing: DeviceDrawing, *, draws_none: str = "", is_lazy: bool = False
    ) -> None:
        self.stock = stock
        self.drawing = drawing
        self.incoming: Mapping[str, Any] = {}
        self._draws_none = draws_none
        self._is_lazy = is_lazy
        self._has_staged = True
        # Seats whose requests asked for log probabilities; some may have left.
        self._scored: set[int] = set()
        self._grammar: Any = None
        self._structured_outputs: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stock, name)

    def add_request(self, index: int, params: Any) -> None:
        """Take a request, new or resumed, into the runner's place `index`, which is also its seat."""
        self._has_staged = True
        if params.logprobs is None and not params.logprob_token_ids:
            self._scored.discard(index)
        else:
            self._scored.add(index)
        try:
            self.stock.add_request(index, params)
        except ValueError:
            # vLLM's sampler has room for 1,024 biased or allowed ids and ends the engine above; ours has not.
            self.drawing.beyond_stock.add(index)
            self.stock.add_request(index, _within_limits(params))
        else:
            self.drawing.beyond_stock.discard(index)
        new = self.incoming[self.stock.req_states.index_to_req_id[index]]
        if new.prompt_token_ids is None:
            self.drawing.enter(index, params, None, ())
            return
        tokens = new.prefill_token_ids
        self.drawing.enter(index, params, new.prompt_token_ids, tokens[new.prompt_len :])

    def apply_staged_writes(self) -> None:
        """Bring what vLLM's sampler has staged to the device; vLLM calls it in every step."""
        if self._has_staged or not self._is_lazy:
            self._has_staged = False
            self.stock.apply_staged_writes()

    @contextlib.contextmanager
    def with_grammar(self, grammar: Any, runner: Any) -> Iterator[None]:
        """Keep a step's grammar masks for the draw; vLLM's GrammarOutput, without speculative tokens."""
        self._grammar, self._structured_outputs = grammar, runner.structured_outputs_worker
        try:
            yield
        finally:
            self._grammar = self._structured_outputs = None

    def _prepare_for_stock(self, logits: torch.Tensor, input_batch: Any, seats: Any) -> None:
        """Write into the logits what vLLM's sampler does not know of: grammars' masks and bad words."""
        if self._grammar is not None:
            self._structured_outputs.apply_grammar_bitmask(
                logits,
                input_batch,
                self._grammar.structured_output_request_ids,
                self._grammar.grammar_bitmask,
            )
        if logits.shape[0] == len(seats):
            self.drawing.count_beyond_stock(seats)
            self.drawing.ban_text(logits, seats)

    def __call__(self, logits: torch.Tensor, input_batch: Any) -> Any:
        """Draw one token for each row of the batch; as vLLM's sampler."""
        from vllm.v1.worker.gpu.sample.output import SamplerOutput

        drawing = self.drawing
        seats = np.asarray(input_batch.idx_mapping_np, np.int64)
        dims = None
        if self._scored:
            dims = self.stock.get_logprobs_dims(seats)
            if dims is None:
                running = self.stock.req_states.index_to_req_id
                self._scored = {seat for seat in self._scored if seat in running}
        num_logprobs = None if dims is None else dims[0]
        rows = len(seats)
        advances = input_batch.seq_lens_cpu_upper_bound.numpy()[:rows] >= input_batch.prefill_len_np[:rows]
        reason = drawing.reason(logits, seats, num_logprobs) or self._draws_none
        if reason:
            drawing.give_up(reason)
            self._prepare_for_stock(logits, input_batch, seats)
            output = self.stock(logits, input_batch)
            if reason != "dummy_run" and logits.shape[0] == rows:
                drawing.follow(seats, advances, output.sampled_token_ids)
            return output
        grammar = None
        if self._grammar is not None:
            grammar = GrammarMasks(self._grammar, input_batch.req_ids, logits.device)
        drawn = drawing.draw(logits, seats, advances, num_logprobs, input_batch.req_ids, torch.int64, grammar)
        return SamplerOutput(
            # The next step reads these on the device before the host has ended a request without a token.
            sampled_token_ids=drawn.tokens,
            logprobs_tensors=drawn.logprobs,
            num_nans=None,
            num_sampled=drawn.num_sampled,
            num_rejected=drawn.num_rejected,
            sampling_mask_tensors=None,
        )

    def take_unread(self) -> Unread | None:
        """Give, once, the last step's draw, whose rows without a token the host must end."""
        return self.drawing.take_unread()
