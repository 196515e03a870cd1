"""`twinjet compare` against real servers over real sockets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.processes import MAIN, server
from twinjet.cli import main

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
OTHER_TOKENIZER = """
from twinjet.engines.fake import FakeTokenizer
of_before = FakeTokenizer.encode
FakeTokenizer.encode = lambda self, text, **how: [t ^ 1 if t < 256 else t for t in of_before(self, text, **how)]
"""
QUICK = ["--synthetic", "8,8", "--requests", "4", "--max-blocks", "6"]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with server(tmp_path_factory.mktemp("twins"), TWINS) as (_, found):
        yield found


def test_unequal_settings_stop_the_run_unless_allowed(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", "one", "two", "--address", address, *QUICK, "--out", str(tmp_path / "run")]
    assert main(command) == 2
    assert "max_concurrent_sequences: 64 and 1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_two_servers_with_different_tokenizers_are_not_compared(
    address: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    """Vocabularies of one size and with one end, whose tokens mean other things."""
    folder = tmp_path_factory.mktemp("other")
    with server(folder, TWINS, main=OTHER_TOKENIZER + MAIN) as (_, other):
        command = ["compare", "one", f"{other}/one", "--address", address, *QUICK, "--allow", "all"]
        assert main([*command, "--out", str(tmp_path / "run")]) == 2
    assert "the two differ in tokenizer: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_slower_side_is_found_and_everything_is_kept(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    command = ["compare", "one", "two", "--address", address, *QUICK, "--json"]
    # One sequence at a time against four: about four times the time a token, however noisy the machine is. The client
    # shares its processor with the server here, so its own share is not judged but shown.
    assert main([*command, "--allow", "max_concurrent_sequences", "--out", str(folder)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"]["outcome"] == "a_faster"
    assert found["sameness"]["num_equal_pairs"] == found["sameness"]["num_pairs"] == 6 * 8
    assert found["run"]["settings"][1]["max_concurrent_sequences"] == "1"
    assert {"run.jsonl", "report.html", "metrics.csv"} <= {path.name for path in folder.iterdir()}
    assert found["verdict"]["words"] in (folder / "report.html").read_text()

    assert main(["compare", "report", str(folder), "--recommend", "1,1"]) == 0
    again = capsys.readouterr().out
    assert again.startswith(found["verdict"]["words"]) and "keep one for this workload" in again

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
    assert main(["compare", "one", "three", "--address", address]) == 1
    assert "three" in capsys.readouterr().err
