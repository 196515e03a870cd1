"""The V2 model runner's sampler (CUDA) wrapped by ours, through its custom-sampler hook. Imports vLLM.

V2 steps ahead of the host. A request's seat is filled when the runner adds it, new or resumed, from the tokens
that the scheduler sent along; afterwards the device keeps it. A batch with a row that ours does not cover goes
to vLLM's sampler, and the seats of its other rows take over the tokens that it draws.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from twinjet.engines.vllm.core.device_drawing import DeviceDrawing, GrammarMasks, Unread, can_draw_on


def hook_custom_sampler(runner_module: Any, vocab_size: int, device: torch.device) -> None:
    """Let model states made from now on answer the V2 runner's custom_sampler call with ours.

    runner_module: vllm.v1.worker.gpu.model_runner, where init_model_state is looked up.
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
                return NativeSamplerV2(sampler, drawing), None

            state.custom_sampler = lambda sampler: theirs(sampler) or custom_sampler(sampler)
        return state

    runner_module.init_model_state = init_model_state


def _within_limits(params: Any) -> Any:
    """Copy parameters without the lists that vLLM's sampler bounds."""
    made = copy.copy(params)
    made.allowed_token_ids = made.logit_bias = None
    made.min_tokens = 0
    return made


class NativeSamplerV2:
    """Offers what the V2 runner calls on its sampler; everything but the drawing is vLLM's.

    Attributes:
        incoming: the scheduler's data of the requests that this step adds, by id; set before each step.
    """

    def __init__(self, stock: Any, drawing: DeviceDrawing) -> None:
        self.stock = stock
        self.drawing = drawing
        self.incoming: Mapping[str, Any] = {}
        self._grammar: Any = None
        self._structured_outputs: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stock, name)

    def add_request(self, index: int, params: Any) -> None:
        """Take a request, new or resumed, into the runner's place `index`, which is also its seat."""
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
        dims = self.stock.get_logprobs_dims(seats)
        num_logprobs = None if dims is None else dims[0]
        rows = len(seats)
        advances = input_batch.seq_lens_cpu_upper_bound.numpy()[:rows] >= input_batch.prefill_len_np[:rows]
        reason = drawing.reason(logits, seats, num_logprobs)
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
