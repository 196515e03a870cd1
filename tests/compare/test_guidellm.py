"""guidellm's reports: its own models take what we write, and what they wrote is read."""

from __future__ import annotations

import json
import math
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.models.simulated_twins import compare_twins
from tests.models.virtual_time import run_virtual
from twinjet.cli import main
from twinjet.compare import analysis, workload
from twinjet.compare.guidellm import read_reports, write_report
from twinjet.compare.records import RunData
from twinjet.compare.statistics import Precision
from twinjet.errors import ConfigError

ROOT = Path(__file__).parent.parent.parent
FIXTURE = Path(__file__).parent / "guidellm-0.8.1.json"
"""Written by guidellm's own models from a report of ours with two requests a side."""


@pytest.fixture(scope="module")
def data() -> RunData:
    precision = Precision(half_width=0.02, min_blocks=6, max_blocks=6)
    load = workload.Load("constant", rate=8.0)
    run = run_virtual(compare_twins(5, 0.2, load=load, precision=precision, requests_per_leg=3))
    run.header = {
        "names": ["left", "right"], "metric": "e2e", "digest": "d", "seed": 5, "started_at": "2026-11-26T10:00:00Z",
        "load": {"kind": "constant", "rate": 8.0},
    }  # fmt: skip
    run.records = [
        replace(
            r,
            num_prompt_tokens=32,
            error="Overloaded: full" if (r.arm, r.leg, r.index) == ("b", 1, 1) else "",
        )
        for r in run.records
    ]
    return run


def _interpreter() -> str | None:
    """An interpreter that has guidellm, made by `make guidellm` or named by the environment."""
    if named := os.environ.get("TWINJET_GUIDELLM_PYTHON"):
        return named
    made = ROOT / ".cache" / "guidellm" / "bin" / "python"
    return str(made) if made.exists() else None


def _asked(report: Path, *copy: Path) -> list[dict[str, Any]]:
    interpreter = _interpreter()
    if interpreter is None:
        pytest.skip("guidellm is not installed: make guidellm")
    check = Path(__file__).parent / "guidellm_check.py"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run(
        [interpreter, str(check), str(report), *map(str, copy)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    told: list[dict[str, Any]] = json.loads(found.stdout.splitlines()[-1])
    return told


def test_its_own_models_take_what_is_written_and_count_the_same(data: RunData, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    write_report(data, report)
    told = _asked(report, tmp_path / "copy.json")
    assert [one["strategy"] for one in told] == ["constant", "constant"]
    for arm, one in zip("ab", told, strict=True):
        mine = [r for r in data.records if r.phase == "main" and r.arm == arm]
        good = [r for r in mine if not r.error]
        assert (one["num_successful"], one["num_errored"]) == (len(good), len(mine) - len(good))
        assert one["duration"] == pytest.approx(
            math.fsum(leg.seconds for leg in data.legs if leg.phase == "main" and leg.arm == arm), abs=1e-5
        )
        assert one["output_tokens"] == [len(r.token_ids) for r in good]
        # Times since 1970 as doubles are good to a quarter of a microsecond.
        assert one["ttft_ms"] == pytest.approx([1e3 * (r.token_times[0] - r.sent_at) for r in good], abs=1e-3)
        assert one["itl_ms"] == pytest.approx([1e3 * (r.tpot_s or 0) for r in good], abs=1e-3)
        assert one["mean_ttft_ms"] == pytest.approx(sum(one["ttft_ms"]) / len(good), abs=1e-3)
        assert one["tokens_per_s"] == pytest.approx(analysis.throughput(data, arm))
    copied = read_reports([tmp_path / "copy.json"])
    assert len(copied.records) == sum(r.phase == "main" for r in data.records)


def test_what_was_written_is_read_back(data: RunData, tmp_path: Path) -> None:
    write_report(data, tmp_path / "report.json")
    back = read_reports([tmp_path / "report.json"])
    assert back.header["names"] == ["left", "right"]
    for arm in ("a", "b"):
        old = [r for r in data.records if r.phase == "main" and r.arm == arm]
        new = [r for r in back.records if r.arm == arm]
        assert sorted(r.error for r in old) == sorted(r.error for r in new)
        key = [(round(r.e2e_s, 5), len(r.token_ids), r.num_prompt_tokens) for r in old]
        assert sorted(key) == sorted((round(r.e2e_s, 5), len(r.token_ids), r.num_prompt_tokens) for r in new)
    verdict = analysis.judge(back, analysis.Settings())
    assert verdict.words.startswith("not comparable because these are separate runs of guidellm")


def test_a_report_of_theirs_is_shown_and_not_judged(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["compare", "report", str(FIXTURE), "--out", str(tmp_path / "page"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in found["metrics"]}
    assert rows["ttft p50"]["a"] > 0 and rows["ttft p50"]["b"] > rows["ttft p50"]["a"]
    assert "itl p50" not in rows and found["sameness"]["num_pairs"] == 0
    assert "separate runs of guidellm" in (tmp_path / "page" / "report.html").read_text()
    assert main(["compare", "report", str(FIXTURE), "--other", str(FIXTURE)]) == 1
    assert "separate runs" in capsys.readouterr().out


def test_closed_loops_of_theirs_have_no_intended_start(data: RunData, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    write_report(data, report)
    tree = json.loads(report.read_text())
    for benchmark in tree["benchmarks"]:
        benchmark["config"]["strategy"] = {"type_": "concurrent", "streams": 2}
        for request in benchmark["requests"]["successful"]:
            request["info"]["timings"]["targeted_start"] -= 100
    report.write_text(json.dumps(tree))
    assert max(r.e2e_s for r in read_reports([report]).records) < 100


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "not a report of guidellm"),
        ("[]", "not a report of guidellm"),
        ('{"benchmarks": 3}', "not a report of guidellm"),
        ('{"metadata": {"version": 1}, "benchmarks": []}', "version 1; known: 2"),
        ('{"benchmarks": []}', "0 benchmark"),
        ('{"benchmarks": [{}, {}]}', "not a benchmark"),
        ('{"benchmarks": [3, 4]}', "not a benchmark"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path: Path, text: str, what: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ConfigError, match=what):
        read_reports([tmp_path / "x.json"])
