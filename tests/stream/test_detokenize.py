"""The native detokenizer against the tokenizers library: pieces join to what decoding all ids at once gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from twinjet._core import Output, Vocabulary
from twinjet.models.vocabulary import read_vocabulary

WORDS = ["▁Hello", "▁world", "!", "▁", "▁▁", "é", "▁日本", "語", "🌶", "a▁b", "<0x0G>", "▁<0x41>"]
BYTES = [f"<0x{b:02X}>" for b in range(256)]


def _sentencepiece(*, strip: bool, adds_space: bool = True) -> Tokenizer:
    """A SentencePiece model as converted for Llama 2 (strip) or Gemma."""
    vocab = {piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", *BYTES, *WORDS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if strip:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", AddedToken("<|tool▁call|>", special=True)])
    tokenizer.add_tokens(["plain ▁added"])
    return tokenizer


def _unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), *((w, -1.0) for w in WORDS)], unk_id=0))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    return tokenizer


def _wordpiece() -> Tokenizer:
    words = ["[UNK]", "hello", "##ing", "world", ",", "'", "##s", "é", "##語", "do", "not"]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.add_special_tokens(["[UNK]"])
    return tokenizer


@pytest.fixture(scope="module")
def smol(demo_model_path: Path) -> Tokenizer:
    return Tokenizer.from_file(str(demo_model_path / "tokenizer.json"))


@pytest.fixture(scope="module")
def smol_vocabulary(smol: Tokenizer) -> Vocabulary:
    return read_vocabulary(smol)


SMALL = {
    "llama-like": _sentencepiece(strip=True),
    "gemma-like": _sentencepiece(strip=False),
    "metaspace": _unigram(),
    "wordpiece": _wordpiece(),
}
VOCABULARIES = {name: read_vocabulary(tokenizer) for name, tokenizer in SMALL.items()}


def joined(vocabulary: Vocabulary, ids: Sequence[int], *, skip_special: bool) -> tuple[list[str], str]:
    """Give the text after each token, and the whole with the end's."""
    output = Output(vocabulary, max_tokens=max(1, len(ids)), skip_special=skip_special)
    pieces = [output.take([token])[1] for token in ids]
    return pieces, "".join(pieces)


def test_which_decoders_are_native() -> None:
    assert {name: v.is_native for name, v in VOCABULARIES.items()} == {
        "llama-like": True, "gemma-like": True, "metaspace": True, "wordpiece": False,
    }  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
@settings(max_examples=300)
@given(data=st.data(), skip_special=st.booleans())
def test_any_ids_of_a_small_vocabulary(name: str, data: st.DataObject, skip_special: bool) -> None:
    tokenizer, vocabulary = SMALL[name], VOCABULARIES[name]
    some_bytes = [3 + b for b in "🌶語é a".encode()] if "like" in name else [0]
    ids = data.draw(
        st.lists(st.one_of(st.integers(0, len(vocabulary) + 1), st.sampled_from(some_bytes)), max_size=24)
    )
    expected = tokenizer.decode(ids, skip_special_tokens=skip_special)
    assert vocabulary.decode(ids, skip_special=skip_special) == expected
    assert joined(vocabulary, ids, skip_special=skip_special)[1] == expected


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(st.integers(0, 49_153), max_size=40), skip_special=st.booleans())
def test_any_ids_of_a_real_vocabulary(
    smol: Tokenizer, smol_vocabulary: Vocabulary, ids: list[int], skip_special: bool
) -> None:
    expected = smol.decode(ids, skip_special_tokens=skip_special)
    assert smol_vocabulary.decode(ids, skip_special=skip_special) == expected
    assert joined(smol_vocabulary, ids, skip_special=skip_special)[1] == expected


def test_every_token_of_a_real_vocabulary_alone(smol: Tokenizer, smol_vocabulary: Vocabulary) -> None:
    assert smol_vocabulary.is_native
    for token in range(smol.get_vocab_size()):
        assert smol_vocabulary.token_text(token) == smol.decode([token], skip_special_tokens=False)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cs", "Cc"]), max_size=60)
    | st.text("🌶🦜👩‍👩‍👧日本語한국é a\n", max_size=40)
)
def test_no_half_character_is_shown_before_the_end(
    smol: Tokenizer, smol_vocabulary: Vocabulary, text: str
) -> None:
    ids = smol.encode(text, add_special_tokens=False).ids
    shown = ""
    for piece in joined(smol_vocabulary, ids, skip_special=True)[0]:
        shown += piece
        assert text.startswith(shown)
    assert shown == text


def test_half_a_character_cut_by_the_end(smol: Tokenizer, smol_vocabulary: Vocabulary) -> None:
    ids = smol.encode("🌶🌶", add_special_tokens=False).ids
    for size in range(len(ids) + 1):
        pieces, text = joined(smol_vocabulary, ids[:size], skip_special=True)
        assert text == smol.decode(ids[:size])
        assert "\ufffd" not in "".join(pieces[:-1])
    assert joined(smol_vocabulary, ids[:-1], skip_special=True)[1] == "🌶\ufffd"


def test_a_run_of_bytes_shows_when_its_end_is_known() -> None:
    vocabulary = VOCABULARIES["gemma-like"]
    pepper = [3 + b for b in "🌶".encode()]
    end = len(vocabulary) - 1
    assert joined(vocabulary, [*pepper, end], skip_special=True)[0] == ["", "", "", "", "🌶plain  added"]


def test_token_text_of_a_part_of_a_character() -> None:
    llama = VOCABULARIES["llama-like"]
    assert llama.token_text(3 + 0xE2) == "\ufffd"
    assert llama.token_text(3 + 0x0A) == "\n"
    assert llama.token_text(1) == "<s>"
    assert llama.token_text(259) == " Hello", "a token alone keeps the space that begins a word"
    assert llama.token_text(10_000) == llama.token_text(-1) == ""


def test_a_decoder_that_fails_fails_the_output() -> None:
    def decode(ids: Sequence[int], skip_special: bool) -> str:
        raise LookupError(f"no text for {list(ids)}")

    output = Output(Vocabulary.of_function(10, decode, special=[]))
    with pytest.raises(LookupError, match=r"no text for \[7\]"):
        output.take([7])
