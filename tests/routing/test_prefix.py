"""The prefix key: the same on every server and for every prompt that begins alike, another for all else."""

from __future__ import annotations

import pytest

from twinjet.routing.prefix import prefix_key

IDS = tuple(range(1000))


def test_keys_are_the_same_on_every_server() -> None:
    """Servers of different versions stand behind one proxy, so these values do not change."""
    assert prefix_key(IDS) == "d644a835f26361b40011f19110048eb9"
    assert prefix_key(IDS[:16]) == "18136b1b7324b47b0b2d28db9f4426f5"


def test_whole_blocks_of_the_beginning_count_and_what_keeps_blocks_apart() -> None:
    assert prefix_key(IDS[:15]) == ""
    assert prefix_key(IDS[:16]) == prefix_key(IDS[:31]) != prefix_key(IDS[:32])
    assert prefix_key(IDS[:256]) == prefix_key(IDS) != prefix_key(IDS[:255])
    assert prefix_key([*IDS[:255], 7, *IDS[256:]]) != prefix_key(IDS)
    keys = [
        prefix_key(IDS, *kept_apart)
        for kept_apart in (("", ""), ("a", ""), ("", "a"), ("1:ab", ""), ("b", "a"))
    ]
    assert len(set(keys)) == len(keys)
    with pytest.raises(ValueError, match="token"):
        prefix_key([-1] * 16)
