"""A model folder's tokenizer and chat template, without transformers or torch: ready in a tenth of a second.

Implements engines.base.Tokenizer. Templates run sandboxed with the names that Hugging Face templates expect:
messages, add_generation_prompt, tools, documents, the special tokens, raise_exception, strftime_now, the
filter tojson, {% break %} and {% generation %}.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.nodes
import jinja2.parser
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as RustTokenizer

from twinjet.engines.base import ChatTurn, RenderedChat
from twinjet.errors import ConfigError, InvalidRequest, Unsupported
from twinjet.models import unlocked
from twinjet.models.content import ContentGuard

if TYPE_CHECKING:
    from twinjet._core import Vocabulary

_SPECIAL_TOKENS = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip

_CONTINUE_MARK = "\ue0f7twinjet-continues-here\ue0f7"
"""Put behind the final message and sought in the rendering; private-use characters, so no text has it."""

_TRIM_PROBE = " \u2003 "
"""White space behind the mark, which a template that trims takes away."""


class _TransparentBlock(Extension):
    """{% generation %} ... {% endgeneration %}: what the assistant wrote, for training; renders as is."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which a model has never seen.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@lru_cache(maxsize=64)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_TransparentBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment.from_string(template)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return value


def _find_template(folder: Path, config: dict[str, Any]) -> str | None:
    # A file of its own wins over the entry in tokenizer_config.json, as in transformers.
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    entry = config.get("chat_template") or _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(entry, list):
        named = {t["name"]: t["template"] for t in entry}
        entry = named.get("default")
    return entry if isinstance(entry, str) else None


def _special_tokens(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    sources = (_read_json(folder / "special_tokens_map.json"), config)
    tokens: dict[str, str] = {}
    for source in sources:
        for name in _SPECIAL_TOKENS:
            entry = source.get(name)
            text = entry.get("content") if isinstance(entry, dict) else entry
            if isinstance(text, str):
                tokens[name] = text
    return tokens


class HfTokenizer:
    """The tokenizer of a Hugging Face model folder; needs its tokenizer.json. Thread-safe.

    vocab_size: number of token ids it knows, added tokens included (a model's logits may have more rows).
    template: overrides the folder's chat template.
    Raises ConfigError if the folder has no tokenizer.json or one of its files cannot be read.
    """

    def __init__(self, folder: Path | str, *, template: str | None = None) -> None:
        folder = Path(folder)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ConfigError(f"{folder} has no tokenizer.json; only models with one are supported")
        try:
            config = _read_json(folder / "tokenizer_config.json")
            self._special = _special_tokens(folder, config)
            self._template = template if template is not None else _find_template(folder, config)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"the tokenizer files of {folder} cannot be read: {error}") from error
        self._tokenizer = _load(file)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = bool(config.get("split_special_tokens", False))
        self._guard = ContentGuard(self._tokenizer)
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.has_chat_template: bool = self._template is not None
        if self._template is not None:
            try:
                _compile(self._template)
            except jinja2.TemplateError as error:
                raise ConfigError(f"the chat template of {folder} does not compile: {error}") from error

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What each token says; read once, some tenths of a second for a large vocabulary."""
        from twinjet.models.vocabulary import read_vocabulary

        return read_vocabulary(self._tokenizer)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Give the token ids of a text; add_special_tokens adds those that tokenizer.json says."""
        ids: list[int] = unlocked.encode(self._tokenizer, text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Give the text of token ids; incomplete characters show as U+FFFD. Unknown ids give no text."""
        return unlocked.decode(self._tokenizer, token_ids, skip_special_tokens=skip_special_tokens)

    def render_chat(self, messages: Sequence[ChatTurn], *, continue_final: bool) -> str:
        """Render a conversation as the model's template says.

        continue_final: end inside the last message; otherwise the assistant's turn is opened.
        Raises InvalidRequest if the template refuses the conversation, Unsupported if there is no template.
        """
        if self._template is None:
            raise Unsupported("chat", "its tokenizer has no chat template")
        if not messages:
            raise InvalidRequest.of("messages", "has no entries; at least one is needed")
        turns = [{"role": turn.role, "content": turn.content} for turn in messages]
        if not continue_final:
            return self._render(turns, add_generation_prompt=True)
        turns[-1]["content"] += _CONTINUE_MARK + _TRIM_PROBE
        head, mark, tail = self._render(turns, add_generation_prompt=False).rpartition(_CONTINUE_MARK)
        if not mark:
            raise InvalidRequest.of(
                "continue_final_message", "the model's chat template leaves out the final message"
            )
        # The mark kept the message's trailing space alive; a template that trims would have cut it.
        return head if tail.startswith(_TRIM_PROBE) else head.rstrip()

    def render_as_data(self, messages: Sequence[ChatTurn], *, continue_final: bool) -> RenderedChat:
        """Render a conversation whose content cannot steer the template; raises as render_chat does."""
        cover = self._guard.cover()
        covered = [ChatTurn(turn.role, cover.hide(turn.content)) for turn in messages]
        return cover.reveal(self.render_chat(covered, continue_final=continue_final))

    def encode_rendered(self, rendered: RenderedChat, *, add_special_tokens: bool) -> list[int]:
        """Give the token ids of a rendering, whose plain spans give no control token. Raises InvalidRequest."""
        return self._guard.encode(rendered, add_special_tokens=add_special_tokens)

    def _render(self, turns: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        assert self._template is not None
        try:
            return _compile(self._template).render(
                messages=turns,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._special,
            )
        except jinja2.TemplateError as error:
            raise InvalidRequest.of(
                "messages", f"the model's chat template refuses the conversation: {error.message}"
            ) from error
        except (TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            raise InvalidRequest.of(
                "messages", "the model's chat template cannot render the conversation"
            ) from error


def _load(file: Path) -> RustTokenizer:
    try:
        return RustTokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"{file} cannot be read: {error}") from error
