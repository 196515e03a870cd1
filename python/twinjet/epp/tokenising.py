"""Token ids of text and chat prompts, for the index of what replicas tell of their caches."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from google.protobuf.message import DecodeError

from twinjet.addresses import caller_of
from twinjet.engines.base import ChatTurn
from twinjet.errors import ConfigError, TwinjetError
from twinjet.fair_threads import FairThreads
from twinjet.models.tokenizer import HfTokenizer
from twinjet.v1 import generation_pb2

if TYPE_CHECKING:
    from twinjet._core import EppPrompt

logger = logging.getLogger("twinjet.epp")

MAX_BYTES: Final = 512 << 10
"""Of a prompt that is tokenised; a longer one goes by where its like was sent."""
_LONG_BYTES: Final = 64 << 10


class Tokenisers:
    """Tokenizers by model. Raises ConfigError for a folder that has none."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self._by_model: dict[str, Any] = {}
        self._threads = FairThreads(_LONG_BYTES)
        for model, folder in folders.items():
            try:
                self._by_model[model] = HfTokenizer(folder)
            except ConfigError as error:
                raise ConfigError(f"tokenizers.{model}: {error}") from None

    async def tokenise(
        self, prompt: EppPrompt, message: bytes, method: str, client_address: str
    ) -> bytes | None:
        """Give the prompt's token ids as the replicas make them, int32s; None where that cannot be done."""
        model = prompt.model or (next(iter(self._by_model)) if len(self._by_model) == 1 else "")
        tokenizer = self._by_model.get(model)
        if tokenizer is None or len(message) > MAX_BYTES:
            return None
        try:
            work = partial(_tokenise, tokenizer, message, method)
            return await self._threads.run(len(message), work, caller_of(prompt.tenant, client_address))
        except (TwinjetError, ValueError, DecodeError) as error:
            # The replica tells the client.
            logger.debug("a prompt cannot be tokenised: %s", error)
            return None


def _tokenise(tokenizer: Any, message: bytes, method: str) -> bytes:
    if method == "Generate":
        text = generation_pb2.GenerateRequest.FromString(message).text
        return array("i", tokenizer.encode(text, add_special_tokens=True)).tobytes()
    request = generation_pb2.ChatRequest.FromString(message)
    turns = [ChatTurn(turn.role, turn.content) for turn in request.messages]
    continue_final = request.continue_final_message
    if request.parse_control_tokens:
        text = tokenizer.render_chat(turns, continue_final=continue_final)
        return array("i", tokenizer.encode(text, add_special_tokens=False)).tobytes()
    rendered = tokenizer.render_as_data(turns, continue_final=continue_final)
    return array("i", tokenizer.encode_rendered(rendered, add_special_tokens=False)).tobytes()
