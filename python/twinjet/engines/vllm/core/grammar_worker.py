"""The process that checks grammars: vLLM's own checks, one at a time. Loads vLLM when it serves."""

from __future__ import annotations

import pickle
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any


def serve(requests: Connection, checking: bytes) -> None:
    """Answer until the other end closes.

    requests: fields of StructuredOutputsParams come in; (True, all its fields) or (False, why not) go out.
    checking: pickled (model configuration, structured-outputs configuration), as host.py makes it.
    """
    from vllm.tokenizers import cached_tokenizer_from_config

    model_config, outputs_config = pickle.loads(checking)
    tokenizer = cached_tokenizer_from_config(model_config)
    while True:
        try:
            wanted = requests.recv()
        except EOFError:
            return
        requests.send(_check(wanted, model_config, outputs_config, tokenizer))


def _check(
    wanted: dict[str, Any], model_config: Any, outputs_config: Any, tokenizer: Any
) -> tuple[bool, Any]:
    from vllm.exceptions import VLLMClientError
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams

    try:
        params = SamplingParams(structured_outputs=StructuredOutputsParams(**wanted))
        params._validate_structured_outputs(model_config, outputs_config, tokenizer)
    except (VLLMClientError, ValueError) as error:
        return False, str(error.args[0])
    return True, asdict(params.structured_outputs)
