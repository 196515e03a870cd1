"""Keeps what people write from becoming control tokens: a typed "<|im_end|>" is ten characters of text.

A conversation's content is data, and its template alone may end a turn or open one. Text that reads as a control
token is hidden from the template behind a mark that nobody can guess, put back into the rendering, and encoded there
by a second tokenizer that knows no control tokens. Content without such text, nearly all, is encoded as ever.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import AddedToken, Encoding
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.models import WordLevel

from twinjet.engines.base import RenderedChat
from twinjet.errors import InvalidRequest
from twinjet.models import unlocked

Span = tuple[int, int]

_BARRED = re.compile(r"<[|｜].+[|｜]>", re.DOTALL)
_NO_CHARACTER = "\U0010ffff"
_SEPARATOR = f"<{secrets.token_hex(16)}>"


def is_control(text: str, *, special: bool) -> bool:
    """Say whether an added token steers the model, and so must come from a template.

    Besides the special ones, those written in bars: some models mark theirs as ordinary (DeepSeek's user token).
    Others, such as "<think>" or a run of spaces, are what a model itself writes in its text.
    """
    return special or _BARRED.fullmatch(text) is not None


class ContentGuard:
    """Hides control tokens in content and encodes renderings so that none of them comes back. Thread-safe.

    tokenizer: the model's; it is only read.
    """

    def __init__(self, tokenizer: RustTokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        control = {i: t for i, t in added.items() if is_control(t.content, special=t.special)}
        self.control_token_ids = frozenset(control)
        self._finder, self._found = _finder(tokenizer, self.control_token_ids)
        self._plain, self._renumbered = _without(tokenizer, self.control_token_ids)
        # The token for what the vocabulary lacks is often a special one, and steers nothing.
        unknown = self._plain.encode(_SEPARATOR + _NO_CHARACTER, add_special_tokens=False).ids[1:]
        self._kept_out = self.control_token_ids - {self._renumbered.get(i, i) for i in unknown}

    def cover(self) -> Cover:
        """Begin to hide what one conversation holds."""
        return Cover(self._find)

    def encode(self, rendered: RenderedChat, *, add_special_tokens: bool = False) -> list[int]:
        """Give the token ids of a rendering, in whose plain spans no control token is seen.

        add_special_tokens: those that tokenizer.json puts around every text.
        Raises InvalidRequest for a control token of a single character, which cannot be written otherwise.
        """
        text = rendered.text
        found = unlocked.encode(self._tokenizer, text, add_special_tokens=False)
        ids: list[int] = found.ids
        if rendered.plain_spans:
            ids = self._encode_pieces(rendered, found)
        if not add_special_tokens:
            return ids
        around = self._tokenizer.encode("a", add_special_tokens=True)
        added = [bool(mask) for mask in around.special_tokens_mask]
        before, after = added.index(False), added[::-1].index(False)
        return around.ids[:before] + ids + around.ids[len(added) - after :]

    def _encode_pieces(self, rendered: RenderedChat, found: Encoding) -> list[int]:
        """Cut at the control tokens that the template wrote; encode anew each piece that has a plain span."""
        text, ids = rendered.text, found.ids
        result: list[int] = []
        spans = list(reversed(rendered.plain_spans))
        start = first = 0
        for place, (token_id, (begin, end)) in enumerate(zip(ids, found.offsets, strict=True)):
            if token_id not in self.control_token_ids:
                continue
            # Spans that end before this token lie in the piece of text before it.
            has_plain = False
            while spans and spans[-1][1] <= begin:
                spans.pop()
                has_plain = True
            if spans and spans[-1][0] < end:
                continue
            result += self._encode_plain(text, start, begin) if has_plain else ids[first:place]
            result.append(token_id)
            start, first = end, place + 1
        return result + (self._encode_plain(text, start, len(text)) if spans else ids[first:])

    def _find(self, text: str) -> Sequence[Span]:
        found = unlocked.encode(self._finder, text, add_special_tokens=False)
        return [span for i, span in zip(found.ids, found.offsets, strict=True) if i in self._found]

    def _encode_plain(self, text: str, start: int, end: int) -> list[int]:
        # A piece behind a control token stands behind the separator, so that no beginning of a text is seen there.
        lead = _SEPARATOR if start else ""
        found = unlocked.encode(self._plain, lead + text[start:end], add_special_tokens=False)
        result: list[int] = []
        for token_id, (begin, stop) in list(zip(found.ids, found.offsets, strict=True))[bool(lead) :]:
            own_id = self._renumbered.get(token_id, token_id)
            if own_id in self._kept_out:
                # Some models' vocabularies themselves lead from the characters to the token.
                shift = start - len(lead)
                result += self._encode_apart(text[begin + shift : stop + shift])
            else:
                result.append(own_id)
        return result

    def _encode_apart(self, text: str) -> list[int]:
        result: list[int] = []
        for character in text:
            result += self._plain.encode(_SEPARATOR + character, add_special_tokens=False).ids[1:]
        result = [self._renumbered.get(token_id, token_id) for token_id in result]
        if not self._kept_out.isdisjoint(result):
            raise InvalidRequest.of("messages", f"{text!r} is a control token and cannot be written as text")
        return result


class SlowContentGuard:
    """The same for a transformers tokenizer without a Rust one inside, piece by piece. Not thread-safe."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        control = {i: t.content for i, t in added.items() if is_control(t.content, special=t.special)}
        self.control_token_ids = frozenset(control)
        texts = sorted(filter(None, control.values()), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, texts))) if texts else None

    def cover(self) -> Cover:
        """See ContentGuard.cover."""
        return Cover(lambda text: [m.span() for m in self._pattern.finditer(text)] if self._pattern else ())

    def encode(self, rendered: RenderedChat, *, add_special_tokens: bool = False) -> list[int]:
        """See ContentGuard.encode."""
        result: list[int] = []
        start = 0
        for begin, end in rendered.plain_spans:
            result += self._encode(rendered.text[start:begin], split_special_tokens=False)
            result += self._encode_plain(rendered.text[begin:end])
            start = end
        result += self._encode(rendered.text[start:], split_special_tokens=False)
        if not add_special_tokens:
            return result
        whole: list[int] = self._tokenizer.build_inputs_with_special_tokens(result)
        return whole

    def _encode_plain(self, text: str) -> list[int]:
        ids = self._encode(text, split_special_tokens=True)
        if not self.control_token_ids.isdisjoint(ids):
            ids = [i for character in text for i in self._encode(character, split_special_tokens=True)]
        if not self.control_token_ids.isdisjoint(ids):
            raise InvalidRequest.of("messages", f"{text!r} is a control token and cannot be written as text")
        return ids

    def _encode(self, text: str, *, split_special_tokens: bool) -> list[int]:
        ids: list[int] = self._tokenizer.encode(
            text, add_special_tokens=False, split_special_tokens=split_special_tokens
        )
        return ids


class Cover:
    """Marks in place of the control tokens in one conversation's content. find: where those are in a text."""

    def __init__(self, find: Callable[[str], Sequence[Span]]) -> None:
        self._find = find
        self._nonce = ""
        self._hidden: list[str] = []

    def hide(self, text: str) -> str:
        """Give the text with a mark for each control token."""
        parts: list[str] = []
        end = 0
        for start, stop in self._find(text):
            self._nonce = self._nonce or secrets.token_hex(16)
            parts += (text[end:start], f"{self._nonce}{len(self._hidden):08x}")
            self._hidden.append(text[start:stop])
            end = stop
        return "".join((*parts, text[end:])) if parts else text

    def reveal(self, rendering: str) -> RenderedChat:
        """Put back what was hidden, wherever and as often as the template took it."""
        if not self._hidden:
            return RenderedChat(rendering)
        first, *rest = rendering.split(self._nonce)
        parts, spans, length = [first], [], len(first)
        for part in rest:
            hidden = self._hidden[int(part[:8], 16)]
            spans.append((length, length + len(hidden)))
            parts += (hidden, part[8:])
            length += len(hidden) + len(part) - 8
        return RenderedChat("".join(parts), tuple(spans))


def _finder(tokenizer: RustTokenizer, wanted: frozenset[int]) -> tuple[RustTokenizer, frozenset[int]]:
    """Give a tokenizer that sees added tokens alone, as the model's does, and the wanted ones' ids there."""
    added = tokenizer.get_added_tokens_decoder()
    finder = RustTokenizer(WordLevel({"": 0}, unk_token=""))
    if tokenizer.normalizer is not None and any(t.normalized for t in added.values()):
        # A normalized token also matches text that only becomes it, in other letters or widths.
        finder.normalizer = tokenizer.normalizer
    finder.add_tokens([
        AddedToken(t.content, single_word=t.single_word, normalized=t.normalized) for t in added.values()
    ])  # fmt: skip
    ids = (finder.token_to_id(added[i].content) for i in wanted)
    return finder, frozenset(i for i in ids if i)


def _without(tokenizer: RustTokenizer, left_out: frozenset[int]) -> tuple[RustTokenizer, dict[int, int]]:
    """Give a tokenizer on the same model without some added tokens, and its ids that differ from the model's.

    It knows the separator, too.
    """
    plain = RustTokenizer(tokenizer.model)
    if tokenizer.normalizer is not None:
        plain.normalizer = tokenizer.normalizer
    if tokenizer.pre_tokenizer is not None:
        plain.pre_tokenizer = tokenizer.pre_tokenizer
    kept = {i: t for i, t in tokenizer.get_added_tokens_decoder().items() if i not in left_out}
    plain.add_tokens(list(kept.values()))
    plain.add_special_tokens([AddedToken(_SEPARATOR, normalized=False, special=True)])
    own = {plain.token_to_id(t.content): i for i, t in kept.items()}
    return plain, {theirs: ours for theirs, ours in own.items() if theirs is not None and theirs != ours}
