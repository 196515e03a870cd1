"""What the V2 model runner (CUDA) does for each request in every step, made shorter. Imports nothing of vLLM."""

from __future__ import annotations

from typing import Any


def hook_order(runner_module: Any) -> None:
    """Let the V2 runner order batches without a Python call for each request; the order is vLLM's.

    runner_module: vllm.v1.worker.gpu.model_runner, where sort_batch_req_ids is looked up.
    """
    original = runner_module.sort_batch_req_ids

    def sort_batch_req_ids(
        num_tokens: dict[str, int], draft_tokens: dict[str, list[int]], decode_query_len: int
    ) -> list[str]:
        if draft_tokens or decode_query_len != 1:
            ordered: list[str] = original(num_tokens, draft_tokens, decode_query_len)
            return ordered
        # Every request has a token at least, so that decodes come first by the number alone.
        return sorted(num_tokens, key=num_tokens.__getitem__)

    runner_module.sort_batch_req_ids = sort_batch_req_ids
