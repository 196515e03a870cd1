"""Workloads, raw data, sameness and the report, by their content."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from pathlib import Path

import pytest

from tests.models.simulated_twins import compare_twins
from tests.models.virtual_time import run_virtual
from twinjet.compare import analysis
from twinjet.compare.analysis import Slo
from twinjet.compare.plots import Line, Plot
from twinjet.compare.records import Journal, Record, RunData, TokenChances, read_run
from twinjet.compare.report import as_csv, as_html, as_text, make_report
from twinjet.compare.sameness import Answer, compare_answers, summarize
from twinjet.compare.statistics import Precision
from twinjet.compare.workload import Load, Workload, read_prompts, read_trace, synthetic
from twinjet.errors import ConfigError
from twinjet.request import SamplingOverrides

SETTINGS = analysis.Settings(max_cpu=float("inf"))


@pytest.fixture(scope="module")
def data() -> RunData:
    run = run_virtual(compare_twins(5, 0.2, precision=Precision(half_width=0.02, max_blocks=12)))
    run.header = {
        "names": ["vllm", "<trt>"],
        "metric": "token_time",
        "settings": [{"dtype": "x"}, {"dtype": "y"}],
    }
    return run


def test_the_digest_tells_requests_apart() -> None:
    items = synthetic(8, 4, 10, vocab_size=100)
    same = Workload(synthetic(8, 4, 10, vocab_size=100))
    assert Workload(items).digest == same.digest
    others = [
        Workload(synthetic(8, 4, 10, vocab_size=100, seed=1)),
        Workload(items, fixed_length=False),
        Workload(items, sampling=SamplingOverrides(top_p=0.9)),
        Workload(items, sampling=SamplingOverrides(logit_bias={3: 1.0})),
    ]
    assert len({same.digest, *(w.digest for w in others)}) == 5


def test_fixed_lengths_ignore_the_end_token() -> None:
    items = synthetic(8, 4, 2, vocab_size=100)
    assert Workload(items).sampling_of(items[1]).ignore_eos is True
    assert Workload(items).sampling_of(items[1]).seed == 1
    assert Workload(items, fixed_length=False).sampling_of(items[0]).ignore_eos is None


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "not JSON"),
        ("[]", "an object"),
        ('{"text": "a", "token_ids": [1]}', "either"),
        ('{"text": ""}', "not empty"),
        ('{"token_ids": []}', "whole numbers"),
        ('{"token_ids": [1, -2]}', "whole numbers"),
        ('{"token_ids": [1, true]}', "whole numbers"),
        ('{"text": "a", "max_tokens": 0}', "at least 1"),
        ('{"text": "a", "max_tokens": "5"}', "at least 1"),
    ],
)
def test_a_bad_line_of_a_prompt_file_is_named(tmp_path: Path, line: str, what: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"text": "fine"}}\n\n{line}\n')
    with pytest.raises(ConfigError, match=rf"prompts\.jsonl:3: .*{what}"):
        read_prompts(file, max_tokens=8)


def test_prompt_files_of_both_kinds_are_read(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    (tmp_path / "p.jsonl").write_text('{"text": "one", "max_tokens": 3}\n{"token_ids": [1, 2]}\n')
    assert [i.prompt for i in read_prompts(tmp_path / "p.txt", max_tokens=8)] == ["one", "two"]
    items = read_prompts(tmp_path / "p.jsonl", max_tokens=8)
    assert [(i.prompt, i.max_tokens) for i in items] == [("one", 3), ((1, 2), 8)]
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ConfigError, match="holds no prompts"):
        read_prompts(tmp_path / "empty.txt", max_tokens=8)


def test_arrivals_follow_their_kind(tmp_path: Path) -> None:
    assert list(Load("constant", rate=4.0).arrivals(3, seed=0)) == [0.0, 0.25, 0.5]
    times = Load("poisson", rate=10.0).arrivals(4000, seed=1)
    # A sum of 4,000 exponentials of mean 0.1: 400 with a standard deviation of 6.3.
    assert 375 < times[-1] < 425 and list(times) == sorted(times)
    assert times == Load("poisson", rate=10.0).arrivals(4000, seed=1)
    (tmp_path / "trace").write_text("0\n0.5\n2\n")
    trace = Load("trace", trace=read_trace(tmp_path / "trace"))
    assert list(trace.arrivals(5, seed=0))[:3] == [0, 0.5, 2] and trace.arrivals(5, seed=0)[3] > 2
    (tmp_path / "bad").write_text("0\nsoon\n")
    with pytest.raises(ConfigError, match="bad:2: 'soon'"):
        read_trace(tmp_path / "bad")


@pytest.mark.parametrize(
    "wrong",
    [{"kind": "closed", "concurrency": 0}, {"kind": "poisson"}, {"kind": "constant", "rate": float("inf")},
     {"kind": "trace"}, {"kind": "trace", "trace": (1.0, 0.5)}],
)  # fmt: skip
def test_a_load_that_cannot_be_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        Load(**wrong)  # type: ignore[arg-type]


def test_raw_data_survive_a_file(tmp_path: Path, data: RunData) -> None:
    file = tmp_path / "run.jsonl"
    journal = Journal(file)
    journal.header(data.header)
    for leg in data.legs:
        mine = [r for r in data.records if (r.phase, r.block, r.leg) == (leg.phase, leg.block, leg.leg)]
        journal.leg(leg, mine)
    journal.close()
    back = read_run(file)
    assert back.legs == data.legs and back.records == data.records
    assert analysis.judge(back, SETTINGS) == analysis.judge(data, SETTINGS)
    # What was being written when the run was ended is left out, with the leg that it belonged to.
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])
    assert read_run(file).legs == data.legs[:-1]
    file.write_text("\n".join([lines[0], "{}", *lines[1:]]))
    with pytest.raises(ConfigError, match=r"run\.jsonl:2: not a line of a comparison"):
        read_run(file)


def test_answers_are_compared_by_tokens() -> None:
    def entry(token: int, logprob: float, rival: int) -> TokenChances:
        return TokenChances(logprob, ((token, logprob), (rival, logprob - 0.25)))

    a = Answer((1, 2, 3), (entry(1, -0.5, 9), entry(2, -0.5, 7), entry(3, -0.5, 9)), "stop")
    b = Answer((1, 7, 3, 4), (entry(1, -0.75, 9),), "length")
    found = compare_answers(a, b)
    assert (found.num_equal, found.num_compared, found.first_difference) == (1, 4, 1)
    assert found.margin == pytest.approx(0.25) and found.divergence == pytest.approx(0.25)
    assert not found.same_reason
    assert compare_answers(a, a).first_difference is None
    longer = compare_answers(Answer((1,)), Answer((1, 2)))
    assert longer.first_difference == 1 and longer.margin is None
    total = summarize([found, compare_answers(a, a)])
    assert (total.num_pairs, total.num_equal_pairs) == (2, 1) and total.equal_tokens == pytest.approx(4 / 7)


def test_goodput_counts_what_kept_every_limit() -> None:
    record = Record("main", 0, 0, "a", 0, 1.0, 1.0, 2.0, (1.2, 1.3, 1.9), (1, 2, 3))
    assert Slo(ttft_s=0.25).is_met(record) and not Slo(ttft_s=0.15).is_met(record)
    assert Slo(tpot_s=0.36).is_met(record) and not Slo(tpot_s=0.34).is_met(record)
    assert Slo(itl_s=0.61).is_met(record) and not Slo(itl_s=0.5).is_met(record)
    assert not Slo().is_met(Record("main", 0, 0, "a", 0, 1.0, 1.0, 2.0, error="Overloaded"))


def test_the_page_needs_nothing_from_outside_and_says_what_was_found(data: RunData) -> None:
    report = make_report(data, SETTINGS, prices=(1.0, 1.0))
    page = as_html(report, data)
    assert report.verdict.outcome == "a_faster"
    assert f'id="verdict">{report.verdict.words}<' in page
    assert "&lt;trt&gt;" in page and "<trt>" not in page
    assert not re.search(r"(?:src|href)=[\"'](?!data:)", page)
    assert not re.search(r"url\(|@import|<script", page)
    assert page.count("<svg") == 5
    assert "keep vllm for this workload" in page
    rows = list(csv.DictReader(io.StringIO(as_csv(report))))
    ttft = next(row for row in rows if row["metric"] == "ttft p50")
    assert f"<td>{float(ttft['a']):.3f}</td>" in page
    assert report.verdict.words in as_text(report)


def test_equal_speed_leaves_the_price_to_decide(data: RunData) -> None:
    verdict = make_report(data, SETTINGS, prices=(2.0, 1.0)).recommendation
    assert verdict.endswith("keep <trt> for this workload")


def test_a_run_without_blocks_is_no_comparison() -> None:
    empty = RunData({"names": ["A", "B"]})
    report = make_report(empty, SETTINGS)
    assert report.verdict.words == "not comparable because the run was ended before anything was measured"
    assert "not comparable" in as_html(report, empty)
    assert json.loads(json.dumps(as_csv(report)))


@pytest.mark.parametrize(
    ("values", "x_ticks"),
    [((0, 333), ["0", "100", "200", "300", "400"]), ((0, 5800), ["0", "2000", "4000", "6000"]),
     ((-3, 7), ["-5", "-2.5", "0", "2.5", "5", "7.5"]), ((0, 0), ["0", "0.25"])],
)  # fmt: skip
def test_a_plot_has_round_ticks_that_hold_all_values(values: tuple[float, float], x_ticks: list[str]) -> None:
    points = [(values[0], 0.0), (values[1], 99.5), (math.nan, 1e9)]
    svg = Plot("a < b", "x", "y", [Line(points, "#000")]).svg()
    assert re.findall(r'text-anchor="middle">(-?[\d.]+)</text>', svg) == x_ticks
    assert re.findall(r'text-anchor="end">(-?[\d.]+)</text>', svg) == ["0", "25", "50", "75", "100"]
    assert "<title>a &lt; b</title>" in svg and "nan" not in svg
    assert Plot("", "x", "y", [Line([(math.nan, 1.0)], "#000")]).figure() == ""
