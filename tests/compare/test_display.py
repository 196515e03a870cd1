"""What a person sees of a run: both answers beside each other, a bar, plain lines where there is no terminal."""

from __future__ import annotations

import io

import pytest

from twinjet.compare.display import AnswerText, PlainDisplay, RichDisplay, describe, make_display
from twinjet.compare.driver import Arrived, Progress
from twinjet.compare.workload import WorkItem

ITEM = WorkItem(0, "x", 4, 0)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_phase_line_tells_the_time_left() -> None:
    assert (
        describe(Progress("self", 1, 10, 2, 75.0)) == "A against itself, block 2 of 10, about 1 min 15 s left"
    )
    assert describe(Progress("ladder", 0, 2, rate=4.0)) == "ladder of rates (4/s), block 1 of 2"
    assert Progress("main", 1, 4, 2).done == pytest.approx(0.375)


def test_both_answers_stand_side_by_side() -> None:
    console = pytest.importorskip("rich.console")
    screen = io.StringIO()
    display = RichDisplay(
        ("left", "[bold]right"), console.Console(file=screen, width=100, force_terminal=True)
    )
    display.progress(Progress("main", 3, 10, 1, 42.0))
    display.watch("a", ITEM, Arrived((1, 2), text="hello [/] "))
    display.watch("b", ITEM, Arrived((1,), text="bonjour"))
    plain = console.Console(file=io.StringIO(), width=100, record=True)
    plain.print(display.render())
    told = plain.export_text()
    line = next(line for line in told.splitlines() if "hello [/]" in line)
    assert "bonjour" in line
    assert "A: left" in told and "B: [bold]right" in told and "2 tokens" in told
    assert "A against B, block 4 of 10, about 42 s left" in told
    with display:
        display.progress(Progress("main", 4, 10))
    assert "block 5 of 10" in screen.getvalue()


def test_the_next_answer_begins_on_an_empty_panel() -> None:
    answer = AnswerText()
    answer.add(Arrived((1,), text="one"))
    answer.add(Arrived((), reason="stop"))
    assert answer.text == "one"
    answer.add(Arrived((2, 3), text="two"))
    assert (answer.text, answer.num_tokens) == ("two", 2)
    answer.add(Arrived((4,), text="x" * 10_000))
    assert len(answer.text) <= 2000


def test_without_a_terminal_or_without_rich_lines_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    display = make_display(("a", "b"), log)
    assert isinstance(display, PlainDisplay)
    with display:
        display.progress(Progress("self", 0, 10))
        display.watch("a", ITEM, Arrived((1,), text="secret"))
    assert "A against itself, block 1 of 10" in log.getvalue() and "secret" not in log.getvalue()
    assert isinstance(make_display(("a", "b"), Terminal(), is_plain=True), PlainDisplay)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert isinstance(make_display(("a", "b"), Terminal()), PlainDisplay)
