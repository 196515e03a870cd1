"""Embeddings on vLLM's pooling models. Imports vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.exceptions import VLLMClientError
from vllm.pooling_params import PoolingParams
from vllm.v1.engine.exceptions import EngineDeadError

from twinjet.errors import EngineDied, InvalidRequest


async def embed(
    llm: Any, request_id: str, prompt_token_ids: Sequence[int], dimensions: int | None
) -> Sequence[float]:
    """Give the vector of one input. Raises InvalidRequest for dimensions the model lacks, EngineDied."""
    prompt = {"type": "token", "prompt_token_ids": list(prompt_token_ids)}
    params = PoolingParams(task="embed", dimensions=dimensions)
    vector: list[float] = []
    try:
        async for output in llm.encode(prompt, params, request_id):
            vector = output.outputs.data.float().flatten().tolist()
    except EngineDeadError as error:
        raise EngineDied from error
    except (VLLMClientError, ValueError) as error:
        raise InvalidRequest.of("dimensions", str(error.args[0])) from error
    return vector
