"""Seats for the V1 runner, which names its requests by id and keeps their output on the host."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from twinjet.engines.vllm.core.device_drawing import DeviceDrawing, Seats


class DeviceSeats:
    """Which seat each request has.

    The runner's list of output tokens tells, by its length alone, whether a seat is up to date: the tokens in
    it may be placeholders for what the device has drawn and the host has not read.
    """

    def __init__(self, drawing: DeviceDrawing) -> None:
        self._drawing = drawing
        self._seats: dict[str, int] = {}
        self._free: list[int] = []

    def find(self, request_ids: list[str], states: dict[str, Any]) -> Seats:
        """Give the batch's seats, filling those of requests that are new or were rolled back."""
        seats, rows = self._drawing.native.match(request_ids, states, self._seats)
        for row in rows:
            seats[row] = self._fill(request_ids[row], states[request_ids[row]])
        found: Seats = seats
        return found

    def _fill(self, request_id: str, state: Any) -> int:
        seat = self._seats.get(request_id)
        if seat is None:
            seat = self._free.pop() if self._free else len(self._seats)
            self._seats[request_id] = seat
        if state.output_token_ids and min(state.output_token_ids) < 0:
            self._drawing.leave(seat)
            self._drawing.reasons[seat] = "tokens_not_known"
            return seat
        self._drawing.enter(seat, state.sampling_params, state.prompt_token_ids, state.output_token_ids)
        return seat

    def forget(self, request_ids: Iterable[str]) -> None:
        """Free the seats of requests that have ended."""
        for request_id in request_ids:
            seat = self._seats.pop(request_id, None)
            if seat is not None:
                self._drawing.leave(seat)
                self._free.append(seat)

    def __len__(self) -> int:
        return len(self._seats)
