"""The pages in docs/ and a fresh one, in a real browser without a network: no complaint, and tables that hold together."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.models.simulated_twins import compare_twins
from tests.models.virtual_time import run_virtual
from twinjet.compare import analysis
from twinjet.compare.report import as_html, make_report
from twinjet.compare.statistics import Precision

CHROMIUM = shutil.which("chromium")
DOCS = Path(__file__).parent.parent.parent / "docs"
PAGES = sorted(DOCS.glob("compare-*.html"))
VERDICTS = re.compile(
    r"\S+ is faster by \d+\.\d% \[-?\d+\.\d, \d+\.\d\]|no difference shown \(detectable: \d+\.\d% or more\)"
    r"|not comparable because .+"
)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


def _dom(page: Path, scratch: Path) -> str:
    """Open a page with the network cut off; its DOM as text. Fails if the browser complains."""
    assert CHROMIUM is not None
    found = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update", "--proxy-server=127.0.0.1:1",
            "--enable-logging=stderr", "--v=0", f"--user-data-dir={scratch}", "--dump-dom", page.as_uri(),
        ],
        capture_output=True, text=True, check=False, timeout=90,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert "CONSOLE" not in found.stderr, found.stderr
    return found.stdout


def _rows(dom: str) -> dict[str, list[str]]:
    table = re.search(r'<table id="metrics">(.*?)</table>', dom, re.DOTALL)
    assert table is not None
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", table[1])]
    return {row[0]: row[1:] for row in rows if row}


def _check_table(dom: str) -> None:
    rows = _rows(dom)
    assert {"throughput", "ttft p50", "tpot p99", "itl p90", "e2e p99"} <= rows.keys()
    for a, b, _, ratio in rows.values():
        value = float(ratio.split()[0])
        if float(a) > 0.05:
            # Shown to three places; a ratio of quantiles is that of the values shown.
            assert value == pytest.approx(float(b) / float(a), rel=0.02, abs=0.002)
        if (interval := re.search(r"\[(.*?), (.*?)\]", ratio)) is not None:
            assert float(interval[1]) <= value <= float(interval[2])
    for metric in ("ttft", "tpot", "itl", "e2e"):
        for arm in (0, 1):
            p50, p90, p99 = (float(rows[f"{metric} {q}"][arm]) for q in ("p50", "p90", "p99"))
            assert p50 <= p90 <= p99


def test_a_fresh_page_is_shown_as_it_was_written(tmp_path: Path) -> None:
    data = run_virtual(compare_twins(5, 0.2, precision=Precision(half_width=0.02, max_blocks=10)))
    data.header = {"names": ["left", "<right>"], "metric": "token_time", "settings": [{"x": "1"}, {"x": "2"}]}
    report = make_report(data, analysis.Settings(max_cpu=float("inf")))
    page = tmp_path / "page.html"
    page.write_text(as_html(report, data))
    dom = _dom(page, tmp_path)
    _check_table(dom)
    verdict = re.search(r'id="verdict">(.*?)</p>', dom)
    assert verdict is not None and html.unescape(verdict[1]) == report.verdict.words
    assert "&lt;right&gt;" in dom and dom.count("<svg") == 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_pages_in_the_docs_hold_together(page: Path, tmp_path: Path) -> None:
    assert page.stat().st_size < 500_000
    dom = _dom(page, tmp_path)
    _check_table(dom)
    verdict = re.search(r'id="verdict">(.*?)</p>', dom)
    assert verdict is not None and VERDICTS.fullmatch(html.unescape(verdict[1])), verdict
    assert 'id="sameness"' in dom and "same answers (natural lengths)" in dom
    settings = re.search(r'<table id="settings">(.*?)</table>', dom, re.DOTALL)
    assert settings is not None and "<td>sampler</td><td>twinjet</td><td>engine</td>" in settings[1]
