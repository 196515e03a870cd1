"""Names and notes that the front end and the engine's process agree on; needs no vLLM."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

EXTRA_KEY = "twinjet"
"""Under this key of SamplingParams.extra_args our sampler finds what vLLM's own fields cannot hold."""

NO_TOKEN = -1
"""The stop token by which our sampler ends a request whose row has no admissible token."""

COUNTERS_METHOD = "twinjet_sampler_counters"
"""Worker method that gives the sampler's counters."""

_NOTE_PREFIX = "twinjet-grammar "


@dataclass(frozen=True, slots=True)
class GrammarNote:
    """Where a request's compiled grammar lies; takes the place of a grammar's text in vLLM's parameters.

    end_token_ids: the model's own ends. stop_token_ids: what the request adds.
    """

    path: str
    vocabulary_path: str
    end_token_ids: tuple[int, ...]
    stop_token_ids: tuple[int, ...]

    def encode(self) -> str:
        return _NOTE_PREFIX + json.dumps(asdict(self))

    @staticmethod
    def is_one(text: str) -> bool:
        return text.startswith(_NOTE_PREFIX)

    @staticmethod
    def decode(text: str) -> GrammarNote:
        """Read what encode() gave."""
        fields = json.loads(text[len(_NOTE_PREFIX) :])
        ids = {name: tuple(fields[name]) for name in ("end_token_ids", "stop_token_ids")}
        return GrammarNote(**{**fields, **ids})
