"""Stands for the native SeatSampler where there is no device: draws on the CPU, through the same addresses."""

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from twinjet.sampling import STATUS_NO_TOKEN, Request, Sampler


def _memory(address: int, size: int, dtype: type[np.generic]) -> npt.NDArray[Any]:
    kind = np.dtype(dtype)
    raw = (ctypes.c_char * (size * kind.itemsize)).from_address(address)
    return np.frombuffer(raw, kind)


def _masks(address: int, stride: int, rows: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    size = (1 + int(rows.max(initial=0))) * stride
    return np.array(_memory(address, size, np.int32).reshape(-1, stride))


class Receipt:
    def __init__(self, status: npt.NDArray[np.uint32]) -> None:
        self._status = status

    def read(self) -> npt.NDArray[np.uint32]:
        return self._status


class HostSeats:
    """Seats as requests of the CPU's sampler; a seat counts its outputs without looking at the tokens."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.requests: dict[int, Request] = {}
        self.counts: dict[int, int] = {}
        self._sampler = Sampler(1)

    def put(self, seat: int, request: Request) -> None:
        self.requests[seat] = request
        self.counts[seat] = request.num_output_tokens

    def remove(self, seat: int) -> None:
        self.requests.pop(seat, None)
        self.counts.pop(seat, None)

    def num_outputs(self, seat: int) -> int:
        return self.counts[seat]

    def first_empty(self, seats: npt.NDArray[np.int64]) -> int:
        return next((row for row, seat in enumerate(seats.tolist()) if seat not in self.requests), -1)

    def match(
        self, request_ids: list[str], states: Mapping[str, Any], seats: Mapping[str, int]
    ) -> tuple[npt.NDArray[np.int64], list[int]]:
        found = np.array([seats.get(request_id, -1) for request_id in request_ids], np.int64)
        rows = [
            row
            for row, (request_id, seat) in enumerate(zip(request_ids, found.tolist(), strict=True))
            if self.counts.get(seat, -1) != len(states[request_id].output_token_ids)
        ]
        return found, rows

    def draw(
        self, seats: npt.NDArray[np.int64], advances: npt.NDArray[np.bool_], logits: int, row_stride: int,
        dtype: int, *, mask_rows: npt.NDArray[np.int32] | None, masks: int, mask_stride: int, token_ids: int, status: int, tokens64: int, tokens32: int, num_sampled: int,
        num_rejected: int, num_logprobs: int, processed_logprobs: bool, top_ids: int, top_logprobs: int,
        ranks: int, stream: int,
    ) -> Receipt:  # fmt: skip
        assert dtype == 0, "the double reads float32 alone"
        rows = len(seats)
        all_logits = _memory(logits, rows * row_stride, np.float32).reshape(rows, row_stride)
        result = self._sampler.sample(
            np.ascontiguousarray(all_logits[:, : self.vocab_size]),
            [self.requests[seat] for seat in seats.tolist()],
            bitmask=None if mask_rows is None else _masks(masks, mask_stride, mask_rows),
            bitmask_rows=mask_rows,
            advance=np.array(advances),
            num_logprobs=None if num_logprobs < 0 else num_logprobs,
            logprobs_mode="processed" if processed_logprobs else "raw",
        )
        for seat, advance in zip(seats.tolist(), advances.tolist(), strict=True):
            self.counts[seat] += advance
        found = np.asarray(result.status)
        _memory(token_ids, rows, np.int32)[:] = result.token_ids
        _memory(status, rows, np.uint32)[:] = found
        admissible = np.where(found & STATUS_NO_TOKEN, 0, result.token_ids)
        if tokens64:
            _memory(tokens64, rows, np.int64)[:] = admissible
        if tokens32:
            _memory(tokens32, rows, np.int32)[:] = admissible
        _memory(num_sampled, rows, np.int32)[:] = advances
        _memory(num_rejected, rows, np.int32)[:] = 0
        if result.logprobs is not None:
            size = rows * (1 + num_logprobs)
            _memory(top_ids, size, np.int32)[:] = result.logprobs.token_ids.reshape(-1)
            _memory(top_logprobs, size, np.float32)[:] = result.logprobs.logprobs.reshape(-1)
            _memory(ranks, rows, np.int32)[:] = result.logprobs.ranks
        return Receipt(found)

    def follow(
        self, seats: npt.NDArray[np.int64], advances: npt.NDArray[np.bool_], tokens: int, stride: int,
        bits: int, stream: int,
    ) -> None:  # fmt: skip
        values = _memory(tokens, len(seats) * stride, np.int64 if bits == 64 else np.int32)[::stride]
        for seat, advance, token in zip(seats.tolist(), advances.tolist(), values.tolist(), strict=True):
            if seat >= 0 and advance:
                self.requests[seat].append(token)
                self.counts[seat] += 1

    def mask(
        self, seats: npt.NDArray[np.int64], logits: int, row_stride: int, dtype: int, stream: int
    ) -> None:
        assert dtype == 0, "the double writes float32 alone"
        rows = _memory(logits, len(seats) * row_stride, np.float32).reshape(len(seats), row_stride)
        for row, seat in enumerate(seats.tolist()):
            if seat >= 0 and self.requests[seat].has_bad_text:
                rows[row, self.requests[seat].banned_token_ids()] = -np.inf

    def waits(self) -> dict[str, int]:
        return {"buffers": 0, "memory": 0, "results": 0}
