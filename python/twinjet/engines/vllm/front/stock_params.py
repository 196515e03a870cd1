"""SamplingParams for AsyncLLM. Imports vLLM; only the front end that holds AsyncLLM loads it."""

from __future__ import annotations

from typing import Any

from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from twinjet.engines.vllm.fields import NO_TOKEN


class OwnParams(SamplingParams):  # type: ignore[misc]
    """SamplingParams that may hold NO_TOKEN among the stop tokens, and a GrammarNote for a grammar."""

    def _validate_structured_outputs(self, *_: Any) -> None:
        # vLLM's checks compile the grammar in this process, and under "auto" with another compiler.
        if self.structured_outputs is not None:
            self.structured_outputs._backend = "xgrammar"

    def _validate_stop_token_ids(self, model_config: Any) -> None:
        ids = list(self.stop_token_ids)  # type: ignore[has-type]
        self.stop_token_ids = [token for token in ids if token != NO_TOKEN]
        try:
            super()._validate_stop_token_ids(model_config)
        finally:
            self.stop_token_ids = ids


def make_params(fields: dict[str, Any], *, native: bool) -> SamplingParams:
    """Make SamplingParams of what params.sampling_fields() gives."""
    structured = fields.pop("structured_outputs")
    params = OwnParams(
        **fields,
        structured_outputs=None
        if structured is None
        else StructuredOutputsParams(grammar=structured["grammar"]),
        output_kind=RequestOutputKind.DELTA,
        skip_clone=True,
    )
    if native and structured is None:
        # Not among all_stop_token_ids, which vLLM's min-tokens rule masks. Grammars get the stop tokens and
        # refuse it; there, a row without a token ends by a token that the grammar rejects.
        params.stop_token_ids.append(NO_TOKEN)
    return params
