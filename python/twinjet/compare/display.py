"""What a person sees while a comparison runs: both answers side by side and how long it still takes.

With rich and a terminal, panels and a bar; else lines as twinjet.progress writes them. Everything goes to stderr.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TextIO

from twinjet.compare.driver import Arrived, Progress
from twinjet.compare.records import Arm, Phase
from twinjet.compare.workload import WorkItem
from twinjet.progress import Progress as Line
from twinjet.progress import format_elapsed

if TYPE_CHECKING:
    from rich.console import Console, ConsoleRenderable

PHASES: Mapping[Phase, str] = {
    "sameness": "comparing answers",
    "self": "A against itself",
    "main": "A against B",
    "ladder": "ladder of rates",
}
MAX_SHOWN_CHARS = 2000
REFRESH_HZ = 4.0
"""Redrawing is work of the very process that takes times; it is kept rare."""


class Display(AbstractContextManager["Display"], Protocol):
    """Shows a run; used as a context manager around it."""

    def progress(self, progress: Progress) -> None:
        """Say how far the run is."""

    def watch(self, arm: Arm, item: WorkItem, arrived: Arrived) -> None:
        """Take what arrived of the answer that is shown."""


def describe(progress: Progress) -> str:
    """Give a phase line: what is done, which block, how much is left of it."""
    what = PHASES[progress.phase]
    if progress.rate:
        what += f" ({progress.rate:g}/s)"
    left = "" if progress.left_s is None else f", about {format_elapsed(progress.left_s)} left"
    return f"{what}, block {progress.block + 1} of {progress.num_blocks}{left}"


def make_display(names: tuple[str, str], stream: TextIO | None = None, *, is_plain: bool = False) -> Display:
    """Give the display that this terminal can show."""
    stream = sys.stderr if stream is None else stream
    if is_plain or not stream.isatty() or importlib.util.find_spec("rich") is None:
        return PlainDisplay(stream)
    from rich.console import Console

    return RichDisplay(names, Console(file=stream))


class PlainDisplay:
    """Phase lines with a bar; answers are not shown."""

    def __init__(self, stream: TextIO) -> None:
        self._line = Line(stream)

    def progress(self, progress: Progress) -> None:
        self._line.update(describe(progress), progress.done)

    def watch(self, arm: Arm, item: WorkItem, arrived: Arrived) -> None:
        pass

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._line.close()


class AnswerText:
    """The answer that one side gives just now: cleared when another request begins, cut to its end."""

    def __init__(self) -> None:
        self.text = ""
        self.num_tokens = 0
        self._ended = False

    def add(self, arrived: Arrived) -> None:
        """Take what arrived."""
        if self._ended:
            self.text, self.num_tokens, self._ended = "", 0, False
        self.text = (self.text + arrived.text)[-MAX_SHOWN_CHARS:]
        self.num_tokens += len(arrived.token_ids)
        self._ended = bool(arrived.reason)


class RichDisplay:
    """Both answers in panels beside each other above a bar with the time left."""

    def __init__(self, names: tuple[str, str], console: Console) -> None:
        from rich.live import Live

        self._names = names
        self._console = console
        self._answers: dict[Arm, AnswerText] = {"a": AnswerText(), "b": AnswerText()}
        self._now: Progress | None = None
        self._began = time.monotonic()
        self._live = Live(
            console=console, refresh_per_second=REFRESH_HZ, get_renderable=self.render, transient=True
        )

    def progress(self, progress: Progress) -> None:
        self._now = progress

    def watch(self, arm: Arm, item: WorkItem, arrived: Arrived) -> None:
        self._answers[arm].add(arrived)

    def render(self) -> ConsoleRenderable:
        """Give the present picture."""
        from rich.columns import Columns
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        panels = []
        width = max(20, self._console.width // 2 - 1)
        for arm, name, color in (("a", self._names[0], "blue"), ("b", self._names[1], "red")):
            answer = self._answers[arm]  # type: ignore[index]
            lines = answer.text.splitlines()[-8:]
            # Text, not markup: an answer may hold brackets.
            body = Text("\n".join(lines)[-6 * width :], overflow="fold")
            title = Text(f"{arm.upper()}: {name}")
            panels.append(
                Panel(body, title=title, subtitle=f"{answer.num_tokens} tokens", height=10, width=width,
                      border_style=color)
            )  # fmt: skip
        now = self._now
        told = "warming up" if now is None else describe(now)
        bar = ProgressBar(total=1.0, completed=0.0 if now is None else now.done, width=40)
        elapsed = format_elapsed(time.monotonic() - self._began)
        return Group(Columns(panels, padding=(0, 1)), Text(f"{told}; {elapsed} so far"), bar)

    def __enter__(self) -> RichDisplay:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)
