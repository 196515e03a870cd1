"""Stop strings in pieces of text, against the whole text at once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from twinjet.engines.stops import StopScanner

_alphabet = st.text("ab", max_size=6)


def _reference(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Read one character at a time; the first stop string that is complete ends the text."""
    for end in range(1, len(text) + 1):
        complete = [s for s in stops if text[:end].endswith(s)]
        if complete:
            longest = max(complete, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


@given(
    st.lists(_alphabet, max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
    st.booleans(),
)
def test_pieces_give_what_the_whole_text_gives(pieces: list[str], stops: list[str], include: bool) -> None:
    scanner = StopScanner(stops, include=include)
    shown = ""
    whole = ""
    for piece in pieces:
        whole += piece
        shown += scanner.feed(piece)
        if scanner.matched is not None:
            break
        held = len(whole) - len(shown)
        assert held < max((len(s) for s in stops), default=1), "held back more than a stop could need"
    expected, matched = _reference(whole, stops, include)
    assert scanner.matched == matched
    assert shown + scanner.flush() == expected


def test_after_a_match_nothing_more_is_shown() -> None:
    scanner = StopScanner(["END"])
    assert scanner.feed("the END and more") == "the "
    assert scanner.feed("again") == scanner.flush() == ""


def test_text_in_which_no_stop_may_end_can_still_begin_one() -> None:
    scanner = StopScanner(["ab", "abc", "x"])
    assert scanner.feed("x.a", may_match=False) == "x."
    assert scanner.feed("b", may_match=False) == ""
    assert scanner.matched is None
    assert scanner.feed("d") == "abd"
    assert scanner.feed(".a", may_match=False) == "."
    assert scanner.feed("b!") == ""
    assert scanner.matched == "ab"
