"""How a stream is read, apart from who waits for its messages: once, in order, with what had come at hand when it fails."""

from __future__ import annotations

from typing import Any

from twinjet.client._errors import IncompleteStream, StreamConsumed, TwinjetClientError
from twinjet.client._events import Collector, Completion, Event, Summary, event_of


class Reading:
    """What a stream knows of itself over all its tries."""

    def __init__(self) -> None:
        self._collector = Collector()
        self._has_begun = False
        self._is_over = False

    @property
    def request_id(self) -> str:
        """The request's id, "" until the first event."""
        return self._collector.request_id

    def begin(self) -> None:
        """The first event is asked for."""
        self._has_begun = True

    def add(self, event: Event) -> None:
        """An event is handed out."""
        self._collector.add(event)

    def complete(self, error: TwinjetClientError) -> None:
        """Tell in an error what is known of its request and what had come before."""
        error.request_id = error.request_id or self._collector.request_id
        error.outputs = self._collector.partial()

    def end(self) -> None:
        """Nothing more is handed out."""
        self._is_over = True

    def completion(self) -> Completion:
        """Everything that was handed out."""
        return self._collector.completion()

    def check_unread(self, *, whole: bool) -> None:
        """Raise StreamConsumed if it has been read to an end or, where the whole is wanted, at all."""
        if self._is_over or (whole and self._has_begun):
            how = "has been read" if self._is_over else "has been read in part"
            raise StreamConsumed(
                f"this stream {how}, and its events come once; keep what completion() gives, or call again"
            )


class Try:
    """The messages of one call. has_begun: whether any has come; then it is not tried again."""

    def __init__(self) -> None:
        self.has_begun = False
        self._summary: Summary | None = None

    def take(self, message: Any) -> Event | None:
        """Give the event to hand out, if any. Raises IncompleteStream for one behind the summary.

        The summary itself is handed out by end(), once the status behind it has come and is OK.
        """
        self.has_begun = True
        if self._summary is not None:
            raise IncompleteStream("an event came after the summary")
        event = event_of(message)
        if isinstance(event, Summary):
            self._summary = event
            return None
        return event

    def end(self) -> Summary:
        """The status has come and is OK. Raises IncompleteStream if there was no summary."""
        if self._summary is None:
            raise IncompleteStream("the stream ended without a summary")
        return self._summary
