"""Banned strings: no token may complete one, however the text is cut into tokens, and no other token is banned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from twinjet._core import BadText, TokenTexts, Vocabulary
from twinjet.models.token_texts import TokenTextsFile
from twinjet.models.tokenizer import HfTokenizer
from twinjet.sampling import Request, Sampler
from twinjet.sampling.bad_text import BadTextSettings, bad_text

# Byte-level tokens: letters alone and joined, a space, halves of a character, a special token, nothing.
TOKENS = ["a", "b", "c", "ab", "ba", "abc", "bca", "aa", "Ġ", "Ġa", "aĠb", "Ã", "©", "Ã©", "<s>", "ca"]
BYTES = [
    b"a", b"b", b"c", b"ab", b"ba", b"abc", b"bca", b"aa", b" ", b" a", b"a b", b"\xc3", b"\xa9", b"\xc3\xa9",
    b"<s>", b"ca",
]  # fmt: skip
SPECIAL = 14
VOCABULARY = Vocabulary("byte_level", TOKENS, special=[SPECIAL])

words = st.lists(st.text("abc é<s>", min_size=1, max_size=5), min_size=1, max_size=4)
outputs = st.lists(st.integers(0, len(TOKENS) - 1), max_size=12)


def text_of(ids: list[int], skips_special: bool) -> bytes:
    return b"".join(BYTES[i] for i in ids if not (skips_special and i == SPECIAL))


def completes(words: list[str], before: list[int], token: int, skips_special: bool) -> bool:
    """Whether the token brings about a string that is not there yet; one that is cannot be undone."""
    old, new = text_of(before, skips_special), text_of([*before, token], skips_special)
    return any(new.count(w) > old.count(w) or _ends(w, old, new) for w in (word.encode() for word in words))


def _ends(word: bytes, old: bytes, new: bytes) -> bool:
    """Whether an occurrence ends in what was added; counts alone miss overlapping ones."""
    return any(
        new[end - len(word) : end] == word for end in range(len(old) + 1, len(new) + 1) if end >= len(word)
    )


@settings(max_examples=1000)
@given(words, outputs, st.booleans())
def test_exactly_the_tokens_that_complete_a_string_are_banned(
    words: list[str], output: list[int], skips_special: bool
) -> None:
    texts = TokenTexts.load(TokenTexts(VOCABULARY).save())
    assert len(texts) == len(TOKENS)
    made = BadText(texts, words, skips_special=skips_special)
    request = Request(len(TOKENS), bad_text=made)
    assert request.has_bad_text
    for known in range(len(output) + 1):
        wanted = {t for t in range(len(TOKENS)) if completes(words, output[:known], t, skips_special)}
        assert set(request.banned_token_ids().tolist()) == wanted
        if known < len(output):
            request.append(output[known])
    for known in (len(output) // 2, 0):
        request.truncate(known)
        wanted = {t for t in range(len(TOKENS)) if completes(words, output[:known], t, skips_special)}
        assert set(request.banned_token_ids().tolist()) == wanted
    midway = Request(len(TOKENS), bad_text=made, output_token_ids=output)
    again = Request(len(TOKENS), bad_text=made)
    for token in output:
        again.append(token)
    assert set(midway.banned_token_ids().tolist()) == set(again.banned_token_ids().tolist())


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words, st.integers(0, 2**32))
def test_no_draw_brings_about_a_banned_string(words: list[str], seed: int) -> None:
    rng = np.random.default_rng(seed)
    request = Request(
        len(TOKENS), seed=seed, bad_text=BadText(TokenTexts(VOCABULARY), words), logit_bias={0: 5.0},
        allowed_token_ids=list(range(len(TOKENS) - 1)),
    )  # fmt: skip
    sampler, ids = Sampler(1), []
    for _ in range(30):
        token = int(sampler.sample(rng.normal(size=len(TOKENS)).astype(np.float32), [request]).token_ids[0])
        if token < 0:
            break
        ids.append(token)
    assert not any(word.encode() in text_of(ids, True) for word in words)
    assert len(TOKENS) - 1 not in ids


def test_more_texts_than_the_model_has_tokens_and_fewer() -> None:
    made = BadText(TokenTexts(VOCABULARY), ["ca", "é"])
    small = Request(4, bad_text=made, output_token_ids=[2])
    assert set(small.banned_token_ids().tolist()) == {0, 3}
    large = Request(40, bad_text=made, output_token_ids=[2, 39])
    assert set(large.banned_token_ids().tolist()) == {0, 3, 5, 6, 7, 10, 13, 15} & {
        t for t in range(16) if completes(["ca", "é"], [2], t, True)
    }
    assert 39 not in large.banned_token_ids()


@pytest.mark.parametrize("saved", [b"", b"twinjet token texts 1\n", b"x" * 100])
def test_rubbish_is_no_table(saved: bytes) -> None:
    with pytest.raises(ValueError, match="token texts"):
        TokenTexts.load(saved)
    whole = TokenTexts(VOCABULARY).save()
    for cut in range(1, len(whole), 7):
        with pytest.raises(ValueError, match="token texts"):
            TokenTexts.load(whole[:-cut])


def test_an_empty_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        BadText(TokenTexts(VOCABULARY), ["a", ""])


def test_the_file_is_made_once_and_goes_with_its_owner() -> None:
    owner = TokenTextsFile(VOCABULARY)
    first = owner.settings(("a",), skips_special=True)
    second = owner.settings(("b",), skips_special=False)
    assert first.path == second.path
    assert bad_text(first) is bad_text(BadTextSettings(first.path, ("a",), True))
    owner.remove()
    owner.remove()
    assert not Path(first.path).exists()


def test_a_real_vocabulary_bans_a_word_in_every_spelling(demo_model_path: Path) -> None:
    tokenizer = HfTokenizer(demo_model_path)
    texts = TokenTexts(tokenizer.vocabulary)
    for word in ("described", " described", " ", "\n", "AB", "é"):
        request = Request(tokenizer.vocab_size, bad_text=BadText(texts, [word]))
        banned = set(request.banned_token_ids().tolist())
        holding = {
            i for i in range(tokenizer.vocab_size) if word in tokenizer.decode([i], skip_special_tokens=True)
        }
        assert holding <= banned
        cut = word.encode()[:-1]
        if cut:
            ids = tokenizer.encode(word[:-1], add_special_tokens=False) if len(word) > 1 else None
            for token in ids or ():
                request.append(token)
            if ids:
                last = tokenizer.encode(word[-1], add_special_tokens=False)
                assert set(last) <= set(request.banned_token_ids().tolist())
