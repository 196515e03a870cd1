"""The V2 model runner's sampler (CUDA) wrapped by ours, through its custom-sampler hook. Imports vLLM.

Not run on hardware. V2 steps ahead of the host, so a request's native state is never set from the host's
copy of its output: it advances with each draw of ours, and a batch that went to vLLM's sampler takes its
requests out of our hands for good.
"""

from __future__ import annotations

from typing import Any

import torch

from twinjet.engines.vllm.core.requests import native_request, reason_for_stock
from twinjet.engines.vllm.core.sampler import Drawing
from twinjet.engines.vllm.fields import NO_TOKEN
from twinjet.sampling import Request


def hook_custom_sampler(runner_module: Any, vocab_size: int) -> None:
    """Let model states made from now on answer the V2 runner's custom_sampler call with ours.

    runner_module: vllm.v1.worker.gpu.model_runner, where init_model_state is looked up.
    """
    original = runner_module.init_model_state

    def init_model_state(vllm_config: Any, *args: Any) -> Any:
        state = original(vllm_config, *args)
        theirs = state.custom_sampler
        if vllm_config.speculative_config is None:
            state.custom_sampler = lambda sampler: (
                theirs(sampler)
                or (
                    NativeSamplerV2(sampler, vocab_size),
                    None,
                )
            )
        return state

    runner_module.init_model_state = init_model_state


class NativeSamplerV2:
    """Offers what the V2 runner calls on its sampler; everything but the drawing is vLLM's."""

    def __init__(self, stock: Any, vocab_size: int) -> None:
        self.stock = stock
        self.drawing = Drawing(vocab_size, stock.logprobs_mode)
        self._vocab_size = vocab_size
        self._slots: dict[int, Request | str | None] = {}
        self._params: dict[int, Any] = {}
        self._failed: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stock, name)

    def add_request(self, index: int, params: Any) -> None:
        """Take a request, new or resumed, into the slot `index`."""
        # Its tokens are staged, not yet there to read; see _entry.
        self._slots[index] = None
        self._params[index] = params
        self.stock.add_request(index, params)

    def _entry(self, slot: int) -> Request | str:
        entry = self._slots.get(slot, "dummy_run")
        if entry is None:
            params, states = self._params.pop(slot), self.stock.req_states
            num_prompt, num_known = int(states.prompt_len.np[slot]), int(states.prefill_len.np[slot])
            tokens = states.all_token_ids.gpu[slot, :num_known].tolist()
            entry = reason_for_stock(params, tokens[:num_prompt])
            if not entry:
                entry = native_request(params, self._vocab_size, tokens[:num_prompt])
                for token in tokens[num_prompt:]:
                    entry.append(token)
            self._slots[slot] = entry
        return entry

    def __call__(self, logits: torch.Tensor, input_batch: Any) -> Any:
        """Draw one token for each row of the batch; as vLLM's sampler."""
        from vllm.v1.worker.gpu.input_batch import get_num_sampled_and_rejected
        from vllm.v1.worker.gpu.sample.output import SamplerOutput

        slots = input_batch.idx_mapping_np.tolist()
        dims = self.stock.get_logprobs_dims(input_batch.idx_mapping_np)
        num_logprobs = None if dims is None else dims[0]
        reason = self._reason(logits, input_batch, slots, num_logprobs)
        if reason:
            self.drawing.give_up(reason)
            for slot in slots:
                self._slots[slot] = reason
            return self.stock(logits, input_batch)
        requests = [entry for slot in slots if isinstance(entry := self._slots[slot], Request)]
        seq_lens = input_batch.seq_lens_cpu_upper_bound.numpy()[: len(requests)]
        is_done = seq_lens >= input_batch.prefill_len_np[: len(requests)]
        tokens, logprobs = self.drawing.draw(logits, requests, is_done, num_logprobs)
        if self.drawing.has_empty_rows:
            self._failed += [
                input_batch.req_ids[row] for row in (tokens[:, 0] < 0).nonzero().flatten().tolist()
            ]
        num_sampled, num_rejected = get_num_sampled_and_rejected(
            input_batch.seq_lens.new_ones(input_batch.num_reqs), input_batch.seq_lens,
            input_batch.cu_num_logits, input_batch.idx_mapping, self.stock.req_states.prefill_len.gpu,
        )  # fmt: skip
        return SamplerOutput(
            # The next step reads these on the device before the host has ended a request without a token.
            sampled_token_ids=tokens.to(torch.int64).clamp_(min=0),
            logprobs_tensors=logprobs,
            num_nans=None,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
            sampling_mask_tensors=None,
        )

    def _reason(
        self, logits: torch.Tensor, input_batch: Any, slots: list[int], num_logprobs: int | None
    ) -> str:
        if logits.shape[0] != input_batch.num_reqs:
            return "several_rows_a_request"
        for slot in slots:
            entry = self._entry(slot)
            if isinstance(entry, str):
                return entry
        return self.drawing.reason(logits, num_logprobs)

    def take_failed(self) -> list[str]:
        """Give, once, the ids of requests whose last row had no token."""
        failed, self._failed = self._failed, []
        return failed


def marked_output(inner: Any, failed: list[str]) -> Any:
    """Wrap a step's output so that requests without a token end when the host reads it."""
    from vllm.v1.outputs import AsyncModelRunnerOutput

    class MarkedOutput(AsyncModelRunnerOutput):  # type: ignore[misc]
        def get_output(self) -> Any:
            output = inner.get_output()
            mark(output, failed)
            return output

    return MarkedOutput()


def mark(output: Any, failed: list[str]) -> None:
    """Put NO_TOKEN, a stop token of theirs, where these requests' tokens stand."""
    for request_id in failed:
        output.sampled_token_ids[output.req_id_to_index[request_id]] = [NO_TOKEN]
