"""The model's Hugging Face tokenizer behind the Tokenizer protocol, and the model's own files."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinjet.engines.base import ChatTurn, RenderedChat
from twinjet.errors import ConfigError, InvalidRequest
from twinjet.models.content import ContentGuard, SlowContentGuard
from twinjet.request import SamplingOverrides

if TYPE_CHECKING:
    from twinjet._core import Vocabulary


class HfTokenizer:
    """Wraps a transformers tokenizer. Thread-safe: encoding may change shared state, so one call at a time.

    Decoding changes nothing and waits for nobody, since it runs in the loop for every token.
    """

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self.hf = tokenizer
        self.vocab_size = vocab_size
        self.has_chat_template = bool(getattr(tokenizer, "chat_template", None))
        self._lock = threading.Lock()
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._guard = SlowContentGuard(tokenizer) if backend is None else ContentGuard(backend)

    @property
    def eos_token_id(self) -> int | None:
        return getattr(self.hf, "eos_token_id", None)

    @property
    def bos_token_id(self) -> int | None:
        return getattr(self.hf, "bos_token_id", None)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What each token says; of a tokenizer that is not a fast one, it asks decode()."""
        from twinjet.models.vocabulary import function_vocabulary, read_vocabulary

        backend = getattr(self.hf, "backend_tokenizer", None)
        if backend is not None:
            return read_vocabulary(backend)
        special = sorted(set(getattr(self.hf, "all_special_ids", ())))
        return function_vocabulary(
            lambda ids, skip_special: self.decode(ids, skip_special_tokens=skip_special),
            len(self.hf),
            special,
        )

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        with self._lock:
            return list(self.hf.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        # Cleaning up would change text that was shown already, so that no stream could equal it.
        text: str = self.hf.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def render_chat(self, messages: Sequence[ChatTurn], *, continue_final: bool) -> str:
        conversation = [{"role": turn.role, "content": turn.content} for turn in messages]
        try:
            with self._lock:
                text: str = self.hf.apply_chat_template(
                    conversation,
                    tokenize=False,
                    add_generation_prompt=not continue_final,
                    continue_final_message=continue_final,
                )
        except Exception as error:
            raise InvalidRequest.of("messages", f"the chat template refused them: {error}") from error
        return text

    def render_as_data(self, messages: Sequence[ChatTurn], *, continue_final: bool) -> RenderedChat:
        with self._lock:
            cover = self._guard.cover()
            covered = [ChatTurn(turn.role, cover.hide(turn.content)) for turn in messages]
        return cover.reveal(self.render_chat(covered, continue_final=continue_final))

    def encode_rendered(self, rendered: RenderedChat, *, add_special_tokens: bool) -> list[int]:
        if not rendered.plain_spans:
            return self.encode(rendered.text, add_special_tokens=add_special_tokens)
        with self._lock:
            return self._guard.encode(rendered, add_special_tokens=add_special_tokens)


def unwrap_tokenizer(tokenizer: Any) -> Any:
    """Give the transformers tokenizer inside the engine's wrapper; the wrapper lacks vocab_size."""
    return getattr(tokenizer, "tokenizer", tokenizer)


def is_prebuilt(model: str) -> bool:
    """Say whether model is a folder with a built TensorRT engine."""
    return (Path(model) / "rank0.engine").is_file()


def check_prebuilt(name: str, model: str) -> None:
    """Raise ConfigError if model is a built engine whose settings cannot be known."""
    if is_prebuilt(model) and not _read_json(Path(model), "config.json").get("build_config"):
        raise ConfigError(
            f"deployments.{name}.model is a prebuilt engine without its build config: {model}/config.json has no "
            '"build_config"; copy the whole folder that trtllm-build has written'
        )


def model_folder(model: str, llm: Any) -> Path | None:
    """Find the model's files: the folder itself, or where the engine has downloaded them to."""
    for candidate in (model, getattr(llm, "_hf_model_dir", None)):
        if candidate is not None and Path(candidate).is_dir():
            return Path(candidate)
    return None


class ModelFiles:
    """Facts from a model's config.json and generation_config.json; missing files are empty."""

    def __init__(self, folder: Path | None) -> None:
        self._config = _read_json(folder, "config.json")
        self._generation = _read_json(folder, "generation_config.json")

    @property
    def vocab_size(self) -> int | None:
        """Rows of the model's output layer, padding of the checkpoint included."""
        return self._find("vocab_size")

    @property
    def max_context_tokens(self) -> int | None:
        build = self._config.get("build_config") or {}
        return build.get("max_seq_len") or self._find("max_position_embeddings")

    @property
    def max_batch_size(self) -> int | None:
        return (self._config.get("build_config") or {}).get("max_batch_size")

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All end tokens; the engine itself takes only the tokenizer's one."""
        found = self._generation.get("eos_token_id", self._config.get("eos_token_id"))
        if found is None:
            return ()
        return (found,) if isinstance(found, int) else tuple(found)

    @property
    def default_sampling(self) -> SamplingOverrides:
        """The model maker's defaults, the same ones that vLLM takes from generation_config.json."""
        names = {
            "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
            "repetition_penalty": "repetition_penalty", "max_new_tokens": "max_tokens",
        }  # fmt: skip
        found = {
            ours: self._generation[theirs] for theirs, ours in names.items() if theirs in self._generation
        }
        return SamplingOverrides(**{name: value for name, value in found.items() if value is not None})

    def _find(self, name: str) -> int | None:
        for part in ("", "text_config", "pretrained_config"):
            tree: Any = self._config if not part else self._config.get(part) or {}
            if isinstance(tree, Mapping) and tree.get(name) is not None:
                return int(tree[name])
        return None


def _read_json(folder: Path | None, name: str) -> dict[str, Any]:
    if folder is None or not (folder / name).is_file():
        return {}
    try:
        tree = json.loads((folder / name).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {folder / name}: {error}") from error
    return tree if isinstance(tree, dict) else {}
