"""Stop strings in pieces of text, against the whole text at once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from twinjet._core import StopMatcher

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
    scanner = StopMatcher(stops, include=include)
    shown = ""
    whole = ""
    for piece in pieces:
        whole += piece
        shown += scanner.feed(piece)
        if scanner.matched >= 0:
            break
        held = len(whole) - len(shown)
        assert held < max((len(s) for s in stops), default=1), "held back more than a stop could need"
    expected, matched = _reference(whole, stops, include)
    assert (stops[scanner.matched] if scanner.matched >= 0 else None) == matched
    assert shown + scanner.flush() == expected


def test_after_a_match_nothing_more_is_shown() -> None:
    scanner = StopMatcher(["END"])
    assert scanner.feed("the END and more") == "the "
    assert scanner.feed("again") == scanner.flush() == ""
