"""The GGUF reader against files written here byte by byte, and against the definition of each block type."""

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twinjet.models.convert import to_bfloat16
from twinjet.models.gguf import GgufError, GgufFile

F32, F16, Q4_1, Q8_0 = 0, 1, 3, 8


def packed_string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def gguf_bytes(keys: dict[str, tuple[int, bytes]], tensors: dict[str, tuple[list[int], int, bytes]]) -> bytes:
    """A file of version 3; keys: name -> (type, value), tensors: name -> (dims, type, data)."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    for name, (kind, value) in keys.items():
        head += packed_string(name) + struct.pack("<I", kind) + value
    data = b""
    for name, (dims, kind, raw) in tensors.items():
        head += packed_string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, len(data))
        data += raw + bytes(-len(raw) % 32)
    return head + bytes(-len(head) % 32) + data


def write(tmp_path: Path, raw: bytes) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(raw)
    return path


def test_metadata_of_every_kind_is_read(tmp_path: Path) -> None:
    keys = {
        "u8": (0, b"\xff"), "i8": (1, b"\xff"), "u16": (2, b"\x01\x02"), "i16": (3, b"\xff\xff"),
        "u32": (4, struct.pack("<I", 7)), "i32": (5, struct.pack("<i", -7)),
        "f32": (6, struct.pack("<f", 0.5)), "flag": (7, b"\x01"), "text": (8, packed_string("naïve")),
        "list": (9, struct.pack("<IQ", 8, 2) + packed_string("a") + packed_string("")),
        "u64": (10, struct.pack("<Q", 2**63)), "i64": (11, struct.pack("<q", -(2**62))),
        "f64": (12, struct.pack("<d", 0.1)),
    }  # fmt: skip
    file = GgufFile(write(tmp_path, gguf_bytes(keys, {})))
    assert file.metadata == {
        "u8": 255, "i8": -1, "u16": 513, "i16": -1, "u32": 7, "i32": -7, "f32": 0.5, "flag": True,
        "text": "naïve", "list": ["a", ""], "u64": 2**63, "i64": -(2**62), "f64": 0.1,
    }  # fmt: skip


@pytest.mark.parametrize("kind", [F32, F16])
def test_plain_tensors_keep_values_and_shape(tmp_path: Path, kind: int) -> None:
    values = np.array([[1.5, -2.0, 0.25], [0.0, 65504.0, -1e-3]], np.float32)
    raw = values.astype("<f4" if kind == F32 else "<f2").tobytes()
    file = GgufFile(write(tmp_path, gguf_bytes({}, {"pad": ([1], F32, b"\0" * 4), "w": ([3, 2], kind, raw)})))
    expected = values if kind == F32 else values.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(file.read("w"), expected)


@settings(max_examples=50)
@given(st.binary(min_size=16, max_size=16), st.floats(-100, 100, width=16), st.floats(-100, 100, width=16))
def test_q4_1_is_level_times_scale_plus_minimum(
    tmp_path_factory: pytest.TempPathFactory, nibbles: bytes, scale: float, minimum: float
) -> None:
    raw = struct.pack("<ee", scale, minimum) + nibbles
    path = write(tmp_path_factory.mktemp("q4"), gguf_bytes({}, {"w": ([32], Q4_1, raw)}))
    levels = [b & 15 for b in nibbles] + [b >> 4 for b in nibbles]
    expected = [np.float32(level) * np.float32(scale) + np.float32(minimum) for level in levels]
    assert GgufFile(path).read("w").tolist() == expected


@settings(max_examples=50)
@given(st.lists(st.integers(-128, 127), min_size=32, max_size=32), st.floats(-100, 100, width=16))
def test_q8_0_is_level_times_scale(
    tmp_path_factory: pytest.TempPathFactory, levels: list[int], scale: float
) -> None:
    raw = struct.pack("<e32b", scale, *levels)
    path = write(tmp_path_factory.mktemp("q8"), gguf_bytes({}, {"w": ([16, 2], Q8_0, raw)}))
    expected = [np.float32(level) * np.float32(scale) for level in levels]
    assert GgufFile(path).read("w").reshape(-1).tolist() == expected


@given(st.floats(-(2.0**127), 2.0**127, width=32))
def test_bfloat16_is_the_nearest_with_ties_to_even(value: float) -> None:
    bits = int(to_bfloat16(np.array([value], np.float32))[0])
    exact = np.float64(np.float32(value))

    def widen(b: int) -> np.float64:
        return np.float64(np.array([b << 16], np.uint32).view(np.float32)[0])

    neighbours = [b for b in (bits - 1, bits, bits + 1) if 0 <= b <= 0xFFFF and (b & 0x7FFF) <= 0x7F7F]
    best = min(neighbours, key=lambda b: (abs(widen(b) - exact), b & 1))
    assert widen(bits) == widen(best)


def test_wrong_and_damaged_files_are_named_as_such(tmp_path: Path) -> None:
    good = gguf_bytes({"text": (8, packed_string("abc"))}, {"w": ([32], Q8_0, bytes(34))})
    with pytest.raises(GgufError, match="not a GGUF file"):
        GgufFile(write(tmp_path, b"GGML" + good[4:]))
    with pytest.raises(GgufError, match="version 9"):
        GgufFile(write(tmp_path, good[:4] + struct.pack("<I", 9) + good[8:]))
    with pytest.raises(GgufError, match="value type 99"):
        GgufFile(write(tmp_path, gguf_bytes({"k": (99, b"")}, {})))
    with pytest.raises(GgufError, match="ggml type 14"):
        GgufFile(write(tmp_path, gguf_bytes({}, {"w": ([256], 14, bytes(210))}))).read("w")
    with pytest.raises(GgufError, match="cut short"):
        GgufFile(write(tmp_path, good[:-40])).read("w")


def test_a_head_cut_anywhere_is_an_error_and_nothing_worse(tmp_path: Path) -> None:
    good = gguf_bytes({"text": (8, packed_string("abc"))}, {"w": ([32], Q8_0, bytes(34))})
    head_size = good.index(b"w") + 1 + 4 + 8 + 4 + 8
    for size in range(4, head_size):
        with pytest.raises(GgufError):
            GgufFile(write(tmp_path, good[:size]))
