"""Block hashes against their specification on hashlib, in every form of input."""

import array
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.block_hash import hash_blocks, root, siphash_2_4_128
from twinjet._core import BlockHasher

KEY = bytes(range(32))
ALGORITHMS = ["sha256", "siphash"]


def test_model_siphash_gives_the_published_vector() -> None:
    assert siphash_2_4_128(bytes(range(16)), b"").hex() == "a3817f04ba25a8e66df67214c7550293"


@given(
    tokens=st.lists(st.integers(0, 2**31 - 1), max_size=70),
    block_size=st.sampled_from([1, 2, 4, 8, 16, 32]),
    algorithm=st.sampled_from(ALGORITHMS),
    key=st.binary(min_size=32, max_size=32),
    salt=st.binary(max_size=80),
    extra_keys=st.dictionaries(st.integers(0, 20), st.binary(max_size=70), max_size=3),
)
def test_hashes_are_those_of_the_specification(tokens, block_size, algorithm, key, salt, extra_keys) -> None:
    hasher = BlockHasher(block_size, algorithm=algorithm, key=key)
    start = root(key, salt, algorithm)
    expected = hash_blocks(key, block_size, tokens, parent=start, extra_keys=extra_keys, algorithm=algorithm)
    assert hasher.root(salt) == start
    assert hasher.hash_blocks(tokens, salt=salt, extra_keys=extra_keys) == expected
    assert hasher.hash_bytes(tokens, salt=salt, extra_keys=extra_keys) == b"".join(expected)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("block_size", [8, 16, 128])
def test_every_form_of_tokens_hashes_alike(algorithm: str, block_size: int) -> None:
    # Ids of one and of several digits of a Python int, and the largest.
    tokens = [0, 1, 2**15, 2**30 - 1, 2**30, 2**31 - 1, 77, 3] * (2 * block_size // 8)
    hasher = BlockHasher(block_size, algorithm=algorithm, key=KEY)
    expected = hash_blocks(KEY, block_size, tokens, parent=root(KEY, b"", algorithm), algorithm=algorithm)
    forms = [
        tokens,
        tuple(tokens),
        np.array(tokens, dtype=np.int32),
        np.array(tokens, dtype=np.uint32),
        np.array(tokens, dtype=np.int64),
        array.array("i", tokens),
        memoryview(array.array("q", tokens)),
        [np.int64(t) for t in tokens],
    ]
    for form in forms:
        assert hasher.hash_blocks(form) == expected


def test_hashing_goes_on_from_any_block() -> None:
    hasher = BlockHasher(4, key=KEY)
    tokens = list(range(21))
    whole = hasher.hash_blocks(tokens, salt=b"t")
    assert len(whole) == 5
    assert hasher.hash_blocks(tokens, start=8, parent=whole[1]) == whole[2:]
    assert hasher.hash_blocks(tokens, start=20, parent=whole[4]) == []


def test_salt_key_and_extra_bytes_each_change_every_later_block() -> None:
    tokens = list(range(64))
    plain = BlockHasher(16, key=KEY).hash_blocks(tokens)
    salted = BlockHasher(16, key=KEY).hash_blocks(tokens, salt=b"tenant")
    other_key = BlockHasher(16, key=KEY[::-1]).hash_blocks(tokens)
    extra = BlockHasher(16, key=KEY).hash_blocks(tokens, extra_keys={2: b"image"})
    assert not set(plain) & set(salted)
    assert not set(plain) & set(other_key)
    assert extra[:2] == plain[:2]
    assert not set(extra[2:]) & set(plain)


def test_keys_differ_from_hasher_to_hasher_unless_given() -> None:
    tokens = list(range(16))
    assert BlockHasher(16).hash_blocks(tokens) != BlockHasher(16).hash_blocks(tokens)


def test_portable_code_gives_the_same_hashes() -> None:
    program = (
        "from twinjet._core import BlockHasher\n"
        "h = BlockHasher(16, key=bytes(range(32)))\n"
        "print(h.implementation, h.hash_bytes(list(range(1000)), salt=b'x').hex())\n"
    )
    environment = {**os.environ, "TWINJET_CPU_TARGET": "baseline", "PYTHONPATH": os.pathsep.join(sys.path)}
    output = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout.split()
    assert output[0] == "sha256-portable"
    assert output[1] == BlockHasher(16, key=KEY).hash_bytes(list(range(1000)), salt=b"x").hex()


def test_threads_share_a_hasher_without_the_gil() -> None:
    hasher = BlockHasher(16, key=KEY)
    tokens = np.arange(50_000, dtype=np.int32)  # long enough to release the GIL
    expected = hasher.hash_bytes(tokens)
    results: list[bytes] = []
    threads = [threading.Thread(target=lambda: results.append(hasher.hash_bytes(tokens))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 4


@pytest.mark.parametrize(
    ("tokens", "error"),
    [
        ([1, -1] * 8, ValueError),
        ([2**31] * 16, ValueError),
        ([2**70] * 16, ValueError),
        ([1.5] * 16, TypeError),
        (["1"] * 16, TypeError),
        ([None] * 16, TypeError),
        ("text", TypeError),
        (b"bytes", TypeError),
        (7, TypeError),
        (None, TypeError),
        ({1, 2}, TypeError),
        (np.array([-1] * 16, dtype=np.int32), ValueError),
        (np.array([2**31] * 16, dtype=np.uint32), ValueError),
        (np.array([2**40] * 16, dtype=np.int64), ValueError),
        (np.array([-5] * 16, dtype=np.int64), ValueError),
        (np.zeros(16, dtype=np.float32), TypeError),
        (np.zeros(16, dtype=np.int16), TypeError),
        (np.zeros((4, 4), dtype=np.int32), TypeError),
        (np.zeros(32, dtype=np.int32)[::2], ValueError),
        (np.zeros(16, dtype=">i4"), TypeError),
    ],
)
def test_bad_tokens_are_refused(tokens: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        BlockHasher(16).hash_blocks(tokens)


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 0},
        {"block_size": -16},
        {"block_size": 24},
        {"block_size": 131072},
        {"block_size": 16, "key": b"short"},
        {"block_size": 16, "algorithm": "md5"},
    ],
)
def test_bad_hashers_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"."):
        BlockHasher(**options)


@pytest.mark.parametrize(
    "options",
    [{"start": 3}, {"start": -4}, {"start": 100}, {"parent": b"short"}, {"extra_keys": {-1: b""}}],
)
def test_bad_places_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"."):
        BlockHasher(4).hash_blocks(list(range(8)), **options)


def test_a_list_that_changes_while_it_is_read_is_safe() -> None:
    tokens: list[object] = [1] * 64

    class Shrinks:
        def __index__(self) -> int:
            del tokens[3:]
            return 5

    tokens[2] = Shrinks()
    assert len(BlockHasher(1, key=KEY).hash_blocks(tokens)) == 3
