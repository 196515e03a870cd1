"""Reading GGUF files: their metadata, and their tensors as float32.

Covers format version 3 (and 2) and the block types F32, F16, Q8_0 and Q4_1. Everything is read through one
memory map; a tensor is unpacked when it is asked for. Source: the GGUF and ggml-quants descriptions
of the ggml project.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
_BLOCK = 32

Floats = NDArray[np.float32]


class GgufError(ValueError):
    """The file is not GGUF, is cut short, or uses something this reader does not know."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies. shape: row-major, as numpy has it. type: the ggml type number."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


def _f32(raw: NDArray[np.uint8]) -> Floats:
    return raw.view("<f4").astype(np.float32)


def _f16(raw: NDArray[np.uint8]) -> Floats:
    return raw.view("<f2").astype(np.float32)


def _q8_0(raw: NDArray[np.uint8]) -> Floats:
    blocks = raw.reshape(-1, 2 + _BLOCK)
    scale = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    return blocks[:, 2:].view(np.int8).astype(np.float32) * scale


def _q4_1(raw: NDArray[np.uint8]) -> Floats:
    blocks = raw.reshape(-1, 4 + _BLOCK // 2)
    head = np.ascontiguousarray(blocks[:, :4]).view("<f2").astype(np.float32)
    nibbles = blocks[:, 4:]
    # The low nibbles are the first half of the block, the high ones the second.
    levels = np.concatenate([nibbles & 0x0F, nibbles >> 4], axis=1).astype(np.float32)
    return levels * head[:, :1] + head[:, 1:]


_TYPES: dict[int, tuple[int, int, Callable[[NDArray[np.uint8]], Floats]]] = {
    0: (1, 4, _f32),
    1: (1, 2, _f16),
    3: (_BLOCK, 4 + _BLOCK // 2, _q4_1),
    8: (_BLOCK, 2 + _BLOCK, _q8_0),
}
"""ggml type number -> (elements of a block, bytes of a block, unpacking)."""


class GgufFile:
    """A GGUF file. metadata: key -> number, bool, str or list of these. tensors: name -> TensorInfo.

    Raises GgufError if the file cannot be read as GGUF, OSError if it cannot be read at all.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._at = 0
        try:
            self._read_head()
        except (struct.error, UnicodeDecodeError) as error:
            raise GgufError(f"{path.name} is damaged or cut short at byte {self._at}") from error

    def _read_head(self) -> None:
        if self._data[:4] != b"GGUF":
            raise GgufError("not a GGUF file")
        self._at = 4
        version, num_tensors, num_keys = self._unpack("<I"), self._unpack("<Q"), self._unpack("<Q")
        if version not in (2, 3):
            raise GgufError(f"GGUF version {version} is not known; known: 2, 3")
        self.metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string()
            self.metadata[key] = self._value(self._unpack("<I"))
        self.tensors: dict[str, TensorInfo] = {}
        for _ in range(num_tensors):
            name = self._string()
            dims = [self._unpack("<Q") for _ in range(self._unpack("<I"))]
            self.tensors[name] = TensorInfo(
                name, tuple(reversed(dims)), self._unpack("<I"), self._unpack("<Q")
            )
        alignment = int(self.metadata.get("general.alignment", 32))
        self._start = -(-self._at // alignment) * alignment

    def _unpack(self, code: str) -> Any:
        value = struct.unpack_from(code, self._data, self._at)[0]
        self._at += struct.calcsize(code)
        return value

    def _string(self) -> str:
        size = self._unpack("<Q")
        raw = self._data[self._at : self._at + size]
        if len(raw) != size:
            raise GgufError(f"a string of {size} bytes at byte {self._at} ends after the file")
        self._at += size
        return raw.decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            item_kind, count = self._unpack("<I"), self._unpack("<Q")
            return [self._value(item_kind) for _ in range(count)]
        if kind not in _SCALARS:
            raise GgufError(f"value type {kind} at byte {self._at} is not known")
        return self._unpack(_SCALARS[kind])

    def read(self, name: str) -> Floats:
        """Unpack one tensor: float32, row-major, in its own shape. Raises KeyError, GgufError."""
        info = self.tensors[name]
        if info.type not in _TYPES:
            raise GgufError(f"tensor {name} has ggml type {info.type}; known: {sorted(_TYPES)}")
        elements, num_bytes, unpack = _TYPES[info.type]
        count = int(np.prod(info.shape))
        size, start = count // elements * num_bytes, self._start + info.offset
        if count % elements or start + size > len(self._data):
            raise GgufError(f"tensor {name} is damaged or cut short")
        return unpack(np.frombuffer(self._data, np.uint8, size, start)).reshape(info.shape)
