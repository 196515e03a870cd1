"""`twinjet compare` against real servers over real sockets."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.processes import server
from twinjet.cli import main
from twinjet.compare.records import read_run

TWINS = """
[deployments.one]
engine = "fake"
model = "none"
options = { step_s = 0.002 }
[deployments.two]
engine = "fake"
model = "none"
options = { step_s = 0.002, max_num_seqs = 1 }
[deployments.same]
engine = "fake"
model = "none"
options = { step_s = 0.002 }
"""
QUICK = ["--synthetic", "8,8", "--requests", "4", "--max-blocks", "6"]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with server(tmp_path_factory.mktemp("twins"), TWINS) as (_, found):
        yield found


def _check_found(verdict: dict[str, Any]) -> None:
    """A is the faster, unless the machine is so unsteady just now that its noise hides even four times as fast."""
    assert verdict["outcome"] != "b_faster"
    if verdict["outcome"] == "no_difference":
        assert verdict["detectable"] > 1


def test_unequal_settings_stop_the_run_unless_allowed(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", "one", "two", "--address", address, *QUICK, "--out", str(tmp_path / "run")]
    assert main(command) == 2
    assert "max_concurrent_sequences: 64 and 1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_slower_side_is_found_and_everything_is_kept(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    command = ["compare", "one", "two", "--address", address, *QUICK, "--json"]
    # One sequence at a time against four: about four times the time a token.
    code = main([*command, "--allow", "max_concurrent_sequences", "--out", str(folder)])
    found = json.loads(capsys.readouterr().out)
    _check_found(found["verdict"])
    assert code == (found["verdict"]["outcome"] == "not_comparable")
    assert found["sameness"]["num_equal_pairs"] == found["sameness"]["num_pairs"] == 16
    assert found["run"]["settings"][1]["max_concurrent_sequences"] == "1"
    assert {"run.jsonl", "report.html", "metrics.csv"} <= {path.name for path in folder.iterdir()}
    assert found["verdict"]["words"] in (folder / "report.html").read_text()

    assert main(["compare", "report", str(folder), "--recommend", "1,1"]) == code
    again = capsys.readouterr().out
    assert again.startswith(found["verdict"]["words"])
    assert "keep one for this workload" in again or found["verdict"]["outcome"] != "a_faster"

    assert main([*command, "--allow", "max_concurrent_sequences", "--out", str(folder)]) == 2
    assert "exists" in capsys.readouterr().err


def test_a_run_cut_short_is_resumed_by_the_same_requests_alone(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    command = ["compare", "one", "same", "--address", address, *QUICK]
    main([*command, "--out", str(folder)])
    lines = (folder / "run.jsonl").read_text().splitlines()
    cut = [line for line in lines if '"main"' not in line]
    (folder / "run.jsonl").write_text("\n".join(cut) + "\n")
    main([*command, "--resume", str(folder)])
    resumed = (folder / "run.jsonl").read_text().splitlines()
    assert resumed[: len(cut)] == cut and len(resumed) == len(lines)
    capsys.readouterr()
    assert main([*command, "--seed", "1", "--resume", str(folder)]) == 2
    assert "of another run: digest, seed differ" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--synthetic", "8"], "IN,OUT"),
        (["--synthetic", "0,8"], "at least 1"),
        (["--requests", "0"], "at least 1"),
        (["--concurrency", "0"], "at least 1"),
        (["--rate", "nan"], "above 0"),
        (["--ladder", "1,x"], "numbers"),
        (["--slo", "e2e=1"], "ttft, tpot or itl"),
        (["--recommend", "1"], "two prices"),
        (["--precision", "0"], "half width"),
        (["--prompts", "/nowhere"], "cannot read"),
    ],
)
def test_wrong_flags_are_refused(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], what: str
) -> None:
    assert main(["compare", "one", "same", "--address", address, "--out", str(tmp_path / "x"), *flags]) == 2
    assert what in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_an_unknown_model_is_refused_by_the_server(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "one", "three", "--address", address]) == 2
    told = capsys.readouterr().err
    assert "three" in told and "Traceback" not in told


def test_ctrl_c_keeps_what_was_measured_and_resume_needs_no_flags(address: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    data = folder / "run.jsonl"
    command = [sys.executable, "-m", "twinjet.cli", "compare", "one", "same", "--address", address]
    long = [
        *command,
        "--synthetic",
        "8,8",
        "--requests",
        "4",
        "--max-blocks",
        "7",
        "--precision",
        "0.001",
        "--temperature",
        "0.5",
    ]
    with subprocess.Popen(
        [*long, "--out", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 120
        # In the middle of the self-test: a leg is complete, others are not.
        while not data.exists() or '"phase": "self"' not in data.read_text():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in err
    assert f"go on with --resume {folder}" in err and out.startswith("not comparable because ")
    kept = data.read_text().splitlines()
    assert '"type": "leg"' in kept[-1] and (folder / "report.html").exists()
    done = subprocess.run(
        [*command, "--resume", str(folder)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr
    lines = data.read_text().splitlines()
    assert lines[: len(kept)] == kept
    # The block that was ended in its middle was run anew as a whole; its first legs count no more.
    found = read_run(data)
    for phase, num_blocks in (("sameness", 1), ("self", 7), ("main", 7)):
        assert found.complete_blocks(phase) == list(range(num_blocks))  # type: ignore[arg-type]
        assert sum(leg.phase == phase for leg in found.legs) == 4 * num_blocks
    for leg in found.legs:
        mine = [r for r in found.records if (r.phase, r.block, r.leg) == (leg.phase, leg.block, leg.leg)]
        assert len(mine) == (16 if leg.phase == "sameness" else 4)


def test_a_terminal_shows_both_answers_beside_each_other(address: str, tmp_path: Path) -> None:
    pytest.importorskip("rich")
    main_end, terminal = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "twinjet.cli",
        "compare",
        "one",
        "same",
        "--address",
        address,
        *QUICK,
        "--answers",
        "4",
    ]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120", "LINES": "30"}
    with subprocess.Popen(
        [*command, "--out", str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=terminal,
        text=True,
        env=environment,
    ) as process:
        os.close(terminal)
        seen = b""
        # The end of a terminal whose other side is closed is an error of input.
        with contextlib.suppress(OSError):
            while part := os.read(main_end, 65536):
                seen += part
        os.close(main_end)
        assert process.wait(120) in (0, 1)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode(errors="replace"))
    assert re.search(r"─ A: one ─.*─ B: same ─", shown)
    assert "tokens" in shown and "A against itself, block" in shown and "left;" in shown


def test_a_recorded_run_is_the_other_side_of_a_new_one(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    command = ["compare", "two", "one", "--address", address, *QUICK, "--allow", "max_concurrent_sequences"]
    main([*command, "--out", str(old)])
    capsys.readouterr()
    # The requests' flags come from the record.
    against = ["compare", "one", f"recorded:{old}:a", "--address", address, "--max-blocks", "6"]
    assert main([*against, "--out", str(new)]) == 2
    assert "max_concurrent_sequences: 64 and 1" in capsys.readouterr().err
    allowed = [*against, "--allow", "max_concurrent_sequences", "--out", str(new)]
    code = main([*allowed, "--json"])
    found = json.loads(capsys.readouterr().out)
    _check_found(found["verdict"])
    assert found["run"]["recorded"] == f"{old}:a"
    assert found["sameness"]["num_equal_pairs"] == 16
    assert main(["compare", "report", str(new)]) == code
    assert "B was not run beside A: it is" in capsys.readouterr().out
    assert (
        main(
            [
                *against[:3],
                "--address",
                address,
                "--seed",
                "3",
                "--allow",
                "all",
                "--out",
                str(tmp_path / "x"),
            ]
        )
        == 2
    )
    assert "recorded another run: digest, seed differ" in capsys.readouterr().err
    assert main(["compare", f"recorded:{old}", "one", "--address", address]) == 2
    assert "A must be a model that runs" in capsys.readouterr().err
    assert main(["compare", "one", f"recorded:{tmp_path}", "--address", address]) == 2
    assert "cannot read" in capsys.readouterr().err


def test_a_ladder_gives_goodput_under_limits_and_a_recommendation(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    command = ["compare", "one", "two", "--address", address, *QUICK, "--allow", "max_concurrent_sequences"]
    flags = ["--ladder", "20,60", "--slo", "ttft=30", "--recommend", "1,2", "--answers", "0"]
    code = main([*command, *flags, "--out", str(folder), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [(rung["arm"], rung["rate"]) for rung in found["ladder"]] == [
        ("a", 20.0), ("b", 20.0), ("a", 60.0), ("b", 60.0),
    ]  # fmt: skip
    assert all(rung["goodput"] > 0 for rung in found["ladder"])
    _check_found(found["verdict"])
    assert (
        found["recommendation"].endswith("keep one for this workload")
        or found["verdict"]["outcome"] != "a_faster"
    )
    page = (folder / "report.html").read_text()
    for caption in (
        "goodput over offered rate",
        "throughput over offered rate",
        "throughput against latency",
    ):
        assert f"<figcaption>{caption}</figcaption>" in page
    # The same data under a limit that nothing keeps.
    assert main(["compare", "report", str(folder), "--slo", "ttft=0.000001", "--json"]) == code
    again = json.loads(capsys.readouterr().out)
    assert [rung["goodput"] for rung in again["ladder"]] == [0.0] * 4


def test_answers_must_fit_a_schema(address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.json").write_text('{"type": "nothing"}')
    command = ["compare", "one", "same", "--address", address, "--out", str(tmp_path / "x")]
    assert main([*command, "--json-schema", str(tmp_path / "bad.json")]) == 2
    assert "bad.json: not a JSON schema" in capsys.readouterr().err
    assert main([*command, "--json-schema", str(tmp_path / "none.json")]) == 2
    assert "cannot read" in capsys.readouterr().err


def test_nobody_there_is_a_failure_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "one", "two", "--address", "127.0.0.1:1"]) == 1
    assert "Traceback" not in capsys.readouterr().err
