"""Drawing where the logits are, for both of vLLM's runners, without waiting for the device; imports torch.

A running request has a seat: a place on the device for all that its next draw needs. It is filled when the
request enters; afterwards the device itself enters each drawn token there, so a step sends 32 bytes a row and
waits for nothing. What the host must learn of a draw, rows without a token, it reads once the engine has read
the step's tokens.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.v1.outputs import AsyncModelRunnerOutput, LogprobsTensors

from twinjet import _core
from twinjet.engines.vllm.core.requests import native_request, reason_for_stock
from twinjet.engines.vllm.fields import NO_TOKEN
from twinjet.sampling import STATUS_NAN, STATUS_NO_TOKEN, Request
from twinjet.sampling.cuda import has_cuda

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
LOGPROBS_MODES = {"raw_logprobs": "raw", "processed_logprobs": "processed"}

# Steady decoding has one shape; more than this come and go with arrivals.
_MAX_RINGS = 8

Seats = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a step's draw leaves on the device, on the stream that was current.

    Attributes:
        tokens: [rows, 1] of the dtype asked for; 0 where no token is admissible.
        num_sampled: int32 [rows], 1 for the rows that advance, else 0.
        num_rejected: int32 [rows] of zeros.
        logprobs: as vLLM's sampler makes them, or None.
    """

    tokens: torch.Tensor
    num_sampled: torch.Tensor
    num_rejected: torch.Tensor
    logprobs: LogprobsTensors | None


@dataclass(frozen=True, slots=True)
class _Results:
    """Room for a draw's results; the native sampler's arguments for it, and the views that go out."""

    addresses: dict[str, int]
    drawn: Drawn


def _make_results(
    rows: int, num_logprobs: int | None, token_dtype: torch.dtype, device: torch.device
) -> _Results:
    width = 0 if num_logprobs is None else 1 + num_logprobs
    # int64 tokens first, then int32 lists, then logprobs.
    packed = torch.empty((7 + 2 * width) * rows, dtype=torch.int32, device=device)
    base, item = packed.data_ptr(), 4 * rows
    is_wide = token_dtype == torch.int64
    addresses = {
        "token_ids": base + 4 * item, "status": base + 5 * item, "tokens64": base if is_wide else 0,
        "tokens32": 0 if is_wide else base, "num_sampled": base + 2 * item,
        "num_rejected": base + 3 * item, "ranks": base + 6 * item, "top_ids": base + 7 * item,
        "top_logprobs": base + (7 + width) * item,
    }  # fmt: skip
    tokens = packed[: 2 * rows].view(torch.int64) if is_wide else packed[:rows]
    logprobs = None
    if num_logprobs is not None:
        middle = (7 + width) * rows
        logprobs = LogprobsTensors(
            packed[7 * rows : middle].view(rows, width),
            packed[middle:].view(torch.float32).view(rows, width),
            packed[6 * rows : 7 * rows],
        )
    lists = packed[2 * rows : 3 * rows], packed[3 * rows : 4 * rows]
    return _Results(addresses, Drawn(tokens.view(rows, 1), *lists, logprobs))


@dataclass(frozen=True, slots=True)
class Unread:
    """A draw whose statuses the host has not read."""

    receipt: Any
    request_ids: Sequence[str]
    advances: Flags
    counters: Counter[str]

    def failed(self) -> list[str]:
        """Give the requests that have no admissible token. Waits for the draw; call it once."""
        status = self.receipt.read()
        if not status.any():
            return []
        self.counters["rows_with_nan"] += int(np.count_nonzero(status & STATUS_NAN))
        empty = (status & STATUS_NO_TOKEN != 0) & self.advances
        self.counters["rows_without_token"] += int(np.count_nonzero(empty))
        return [self.request_ids[row] for row in np.flatnonzero(empty).tolist()]


class GrammarMasks:
    """A step's grammar masks on the device, and which of them is each row's (-1: none). vLLM's GrammarOutput."""

    def __init__(self, grammar: Any, request_ids: Sequence[str], device: torch.device) -> None:
        places = {name: i for i, name in enumerate(grammar.structured_output_request_ids)}
        self.rows = np.array([places.get(name, -1) for name in request_ids], np.int32)
        masks = torch.from_numpy(grammar.grammar_bitmask)
        # From pinned memory, which torch keeps until the copy is done, the host need not wait.
        self.masks = masks.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else masks


class DeviceDrawing:
    """The seats of one engine's requests on one device, and the counters of what was drawn.

    Attributes:
        counters: what GetModel shows.
        is_warming: the engine warms up; what goes to vLLM's sampler meanwhile is no fall-back.
        native: the native sampler, made with `device`; tests give another.
        reasons: why vLLM's sampler must draw what is in a seat, by seat.
        beyond_stock: seats whose allowed or biased tokens vLLM's sampler has no room for, and does not know.

    A draw's results are overwritten by a draw that begins max_in_flight + 2 steps later: by then the engine has
    read them.
    """

    target = "cuda"

    def __init__(
        self,
        vocab_size: int,
        max_rows: int,
        logprobs_mode: str,
        device: int,
        native: Any = None,
        *,
        max_in_flight: int = 2,
    ) -> None:
        self.vocab_size = vocab_size
        self.logprobs_mode = logprobs_mode
        self.native = _core.SeatSampler(device, vocab_size, max_rows) if native is None else native
        self.is_warming = False
        self.reasons: dict[int, str] = {}
        self.beyond_stock: set[int] = set()
        self._with_bad_text: set[int] = set()
        self._counters: Counter[str] = Counter()
        self._unread: Unread | None = None
        self._ring_size = max_in_flight + 2
        self._rings: dict[tuple[int, int | None, torch.dtype], deque[_Results]] = {}

    @property
    def counters(self) -> dict[str, int]:
        waits = {f"device_waits.{cause}": count for cause, count in self.native.waits().items()}
        return {**self._counters, **waits}

    def enter(self, seat: int, params: Any, prompt: Sequence[int] | None, output: Sequence[int]) -> str:
        """Seat a request with its history, or say why vLLM's sampler must draw it."""
        self.reasons.pop(seat, None)
        self._with_bad_text.discard(seat)
        reason = reason_for_stock(params, prompt)
        if reason:
            self.reasons[seat] = reason
        if reason in ("foreign_request", "prompt_embeddings"):
            self.native.remove(seat)
            return reason
        # What vLLM's sampler draws has a seat too: its bad words are of the seat.
        request = native_request(params, self.vocab_size, prompt or ())
        for token in output:
            request.append(token)
        try:
            self.native.put(seat, request)
        except ValueError:
            # There is no room for its bad words: it ends without a token instead of without them.
            self._counters["requests_without_room"] += 1
            self.native.put(seat, Request(self.vocab_size, allowed_token_ids=(), output_token_ids=output))
            return reason
        if request.has_bad_text:
            self._with_bad_text.add(seat)
        return reason

    def leave(self, seat: int) -> None:
        self.native.remove(seat)
        self.reasons.pop(seat, None)
        self._with_bad_text.discard(seat)

    def ban_text(self, logits: torch.Tensor, seats: Seats) -> None:
        """Mask what the rows' bad words rule out next, in a batch that vLLM's sampler draws."""
        if self._with_bad_text.isdisjoint(seats.tolist()):
            return
        is_ours = logits.dtype in _DTYPES and logits.stride(1) == 1
        work = logits if is_ours else logits.float().contiguous()
        banning = np.array([seat if seat in self._with_bad_text else -1 for seat in seats.tolist()], np.int64)
        self.native.mask(banning, work.data_ptr(), work.stride(0), _DTYPES[work.dtype], _stream_of(work))
        if work is not logits:
            logits.copy_(work)

    def reason(self, logits: torch.Tensor, seats: Seats, num_logprobs: int | None) -> str:
        """Say why vLLM's sampler must draw this batch, "" if it need not."""
        if logits.shape[0] != len(seats):
            return "several_rows_a_request"
        if self.reasons:
            for seat in seats.tolist():
                if seat in self.reasons:
                    return self.reasons[seat]
        if self.native.first_empty(seats) >= 0:
            return "dummy_run"
        if logits.dtype not in _DTYPES or logits.shape[1] != self.vocab_size or logits.stride(1) != 1:
            return "logits_layout"
        if num_logprobs is not None:
            if num_logprobs > _core.CUDA_MAX_LOGPROBS:
                return "more_logprobs_than_on_cuda"
            if self.logprobs_mode not in LOGPROBS_MODES:
                return "logprobs_mode"
        return ""

    def draw(
        self,
        logits: torch.Tensor,
        seats: Seats,
        advances: Flags,
        num_logprobs: int | None,
        request_ids: Sequence[str],
        token_dtype: torch.dtype,
        grammar: GrammarMasks | None = None,
    ) -> Drawn:
        """Start the draw of one token for each row; a batch for which `reason` is "".

        advances: rows whose token becomes part of the output; a row of an unfinished prefill does not.
        token_dtype: torch.int64 or torch.int32. Log probabilities are those before the grammar's masks.
        """
        results = self._results(len(seats), num_logprobs, token_dtype, logits.device)
        receipt = self.native.draw(
            seats,
            advances,
            logits.data_ptr(),
            logits.stride(0),
            _DTYPES[logits.dtype],
            mask_rows=None if grammar is None else grammar.rows,
            masks=0 if grammar is None else grammar.masks.data_ptr(),
            mask_stride=0 if grammar is None else grammar.masks.stride(0),
            **results.addresses,
            num_logprobs=-1 if num_logprobs is None else num_logprobs,
            processed_logprobs=LOGPROBS_MODES.get(self.logprobs_mode) == "processed",
            stream=_stream_of(logits),
        )
        self._unread = Unread(receipt, request_ids, advances, self._counters)
        self._counters["steps"] += 1
        self._counters["rows"] += len(seats)
        if results.drawn.logprobs is not None:
            # Ids are turned into text also for a row that has no token and ends.
            results.drawn.logprobs.logprob_token_ids.clamp_(min=0)
        return results.drawn

    def _results(
        self, rows: int, num_logprobs: int | None, token_dtype: torch.dtype, device: torch.device
    ) -> _Results:
        """Give room for a draw's results: the oldest of this shape, or new."""
        shape = (rows, num_logprobs, token_dtype)
        ring = self._rings.pop(shape, None)
        if ring is None:
            ring = deque()
            while len(self._rings) >= _MAX_RINGS:
                self._rings.pop(next(iter(self._rings)))
        self._rings[shape] = ring
        if len(ring) == self._ring_size:
            ring.rotate(-1)
        else:
            ring.append(_make_results(rows, num_logprobs, token_dtype, device))
        return ring[-1]

    def follow(self, seats: Seats, advances: Flags, tokens: torch.Tensor) -> None:
        """Enter tokens that vLLM's sampler drew, [rows, 1] on the device, for the rows that have seats."""
        ours = np.array([self.native.first_empty(seats[row : row + 1]) < 0 for row in range(len(seats))])
        if not ours.any():
            return
        ours = np.where(ours, seats, -1)
        bits = 64 if tokens.dtype == torch.int64 else 32
        self.native.follow(ours, advances, tokens.data_ptr(), tokens.stride(0), bits, _stream_of(tokens))

    def count_beyond_stock(self, seats: Seats) -> None:
        """Count the rows that vLLM's sampler draws without their allowed or biased tokens."""
        beyond = self.beyond_stock.intersection(seats.tolist()) if self.beyond_stock else ()
        if beyond and not self.is_warming:
            self._counters["rows_beyond_vllms_limits"] += len(beyond)

    def give_up(self, reason: str) -> None:
        """Count a step that vLLM's sampler draws."""
        if self.is_warming or reason == "dummy_run":
            return
        self._counters["stock_steps"] += 1
        self._counters[f"stock_steps.{reason}"] += 1

    def take_unread(self) -> Unread | None:
        """Give, once, the last draw."""
        unread, self._unread = self._unread, None
        return unread


def _stream_of(tensor: torch.Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def can_draw_on(device: torch.device) -> bool:
    """Say whether logits on this device can be drawn there."""
    return device.type == "cuda" and has_cuda()


class MarkedOutput(AsyncModelRunnerOutput):  # type: ignore[misc]
    """A step's output whose requests without a token end when the host reads it."""

    def __init__(self, inner: Any, unread: Unread) -> None:
        self._inner = inner
        self._unread = unread

    def get_output(self) -> Any:
        output = self._inner.get_output()
        mark(output, self._unread.failed())
        return output


def mark(output: Any, failed: Sequence[str]) -> None:
    """Put NO_TOKEN, a stop token of theirs, where these requests' tokens stand."""
    for request_id in failed:
        output.sampled_token_ids[output.req_id_to_index[request_id]] = [NO_TOKEN]
