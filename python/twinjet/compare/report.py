"""What a run says, for people and programs: text for the terminal, CSV, and a page that opens without a network.

The page holds its numbers, plots (SVG) and style in itself; nothing is fetched.
"""

from __future__ import annotations

import csv
import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from twinjet.compare import analysis
from twinjet.compare.records import RunData
from twinjet.compare.statistics import Interval, Verdict

_COLORS = {"a": "#1f6feb", "b": "#d1242f"}
_LATENCIES = (
    ("ttft", "time to first token"),
    ("tpot", "time per output token"),
    ("itl", "inter-token latency"),
    ("e2e", "whole request"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: a metric, its value in both arms and the ratio B / A. unit: "ms" or "tokens/s"."""

    name: str
    unit: str
    a: float
    b: float
    ratio: Interval | None


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that is shown of a run."""

    names: tuple[str, str]
    verdict: Verdict
    rows: tuple[Row, ...]
    sameness: analysis.Sameness
    client: analysis.ClientFacts
    rungs: tuple[analysis.Rung, ...]
    header: Mapping[str, object]
    recommendation: str = ""


def make_report(
    data: RunData,
    settings: analysis.Settings,
    *,
    slo: analysis.Slo | None = None,
    prices: tuple[float, float] | None = None,
) -> Report:
    """Judge a run and gather what is shown. prices: of an hour of each side, in any one currency."""
    names = data.header.get("names", ["A", "B"])
    a, b = str(names[0]), str(names[1])
    verdict = analysis.judge(data, settings, a=a, b=b)
    rows: list[Row] = []
    speeds = analysis.throughput(data, "a"), analysis.throughput(data, "b")
    if speeds[0] and speeds[1]:
        rows.append(Row("throughput", "tokens/s", speeds[0], speeds[1], None))
    for metric, _ in _LATENCIES:
        found = analysis.latency(data, metric)  # type: ignore[arg-type]
        if found is None:
            continue
        for i, quantile in enumerate(("p50", "p90", "p99")):
            ratio = {"p50": found.p50, "p99": found.p99}.get(quantile)
            rows.append(Row(f"{metric} {quantile}", "ms", 1e3 * found.a[i], 1e3 * found.b[i], ratio))
    return Report(
        (a, b),
        verdict,
        tuple(rows),
        analysis.sameness(data),
        analysis.client_facts(data),
        tuple(analysis.ladder(data, slo or analysis.Slo())),
        data.header,
        _recommend((a, b), verdict, speeds, prices) if prices is not None else "",
    )


def _recommend(
    names: tuple[str, str],
    verdict: Verdict,
    speeds: tuple[float | None, float | None],
    prices: tuple[float, float],
) -> str:
    if verdict.interval is None or not speeds[0] or not speeds[1]:
        return "no recommendation: there is no verdict"
    costs = [1e6 * price / 3600 / speed for price, speed in zip(prices, speeds, strict=True) if speed]
    told = ", ".join(f"{name} {cost:.4g}" for name, cost in zip(names, costs, strict=True))
    # The costs' ratio is only as well known as the speeds' ratio.
    price_ratio = prices[1] / prices[0]
    low, high = verdict.interval.low * price_ratio, verdict.interval.high * price_ratio
    if verdict.outcome == "no_difference":
        low, high = min(low, price_ratio), max(high, price_ratio)
    if low <= 1 <= high:
        return f"cost of a million output tokens: {told}; no difference in cost shown: keep the one you know"
    keep = names[0] if low > 1 else names[1]
    return f"cost of a million output tokens: {told}; keep {keep} for this workload"


def as_text(report: Report) -> str:
    """Give the report for a terminal."""
    lines = [report.verdict.words, ""]
    if report.verdict.noise_floor is not None:
        lines.append(
            f"noise floor ({report.names[0]} against itself): {100 * report.verdict.noise_floor:.1f}%"
        )
    width = max((len(row.name) for row in report.rows), default=0)
    for row in report.rows:
        lines.append(f"{row.name:<{width}}  {row.a:>12.3f}  {row.b:>12.3f} {row.unit:<9} {_ratio(row)}")
    same = report.sameness
    if same.num_pairs:
        lines.append(
            f"same answers: {same.num_equal_pairs} of {same.num_pairs}, {100 * same.equal_tokens:.1f}% of tokens equal"
        )
    for rung in report.rungs:
        lines.append(
            f"{rung.arm.upper()} at {rung.rate:g}/s: goodput {rung.goodput:.2f}/s, {rung.tokens_per_s:.0f} tokens/s, "
            f"TTFT p99 {1e3 * rung.ttft_p99_s:.0f} ms"
        )
    client = report.client
    lines.append(
        f"client: {100 * client.cpu:.0f}% of a core, p99 delay in sending {1e3 * client.lag_p99_s:.1f} ms"
    )
    if report.recommendation:
        lines.append(report.recommendation)
    return "\n".join(lines)


def _ratio(row: Row) -> str:
    if row.ratio is None:
        return f"{row.b / row.a:.3f}"
    return f"{row.ratio.ratio:.3f} [{row.ratio.low:.3f}, {row.ratio.high:.3f}]"


def as_csv(report: Report) -> str:
    """Give the table as CSV with a header line."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["metric", "unit", "a", "b", "ratio", "low", "high"])
    for row in report.rows:
        interval = row.ratio
        writer.writerow(
            [row.name, row.unit, row.a, row.b, row.b / row.a if interval is None else interval.ratio,
             "" if interval is None else interval.low, "" if interval is None else interval.high]
        )  # fmt: skip
    return out.getvalue()


def as_html(report: Report, data: RunData) -> str:
    """Give a page of its own: verdict, tables, plots."""
    a, b = map(html.escape, report.names)
    plots = [_cumulative_plot(data, metric, title) for metric, title in _LATENCIES]
    if report.rungs:
        plots.append(_ladder_plot(report.rungs))
        plots.append(_pareto_plot(report.rungs))
    rows = "".join(
        f"<tr><td>{html.escape(row.name)}</td><td>{row.a:.3f}</td><td>{row.b:.3f}</td>"
        f"<td>{row.unit}</td><td>{_ratio(row)}</td></tr>"
        for row in report.rows
    )
    same = report.sameness
    facts = "".join(
        f"<tr><td>{html.escape(str(key))}</td><td>{html.escape(str(value))}</td></tr>"
        for key, value in report.header.items()
        if key not in {"settings"}
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{a} and {b} compared</title>
<link rel="icon" href="data:,">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: #1f2328 }}
h1 {{ font-size: 1.5rem }} .verdict {{ font-size: 1.25rem; padding: .8rem 1rem; background: #eef4ff; border-radius: 6px }}
table {{ border-collapse: collapse; margin: 1rem 0 }} td, th {{ padding: .25rem .8rem; border-bottom: 1px solid #d0d7de; text-align: right }}
td:first-child, th:first-child {{ text-align: left }} figure {{ display: inline-block; margin: .5rem }}
figcaption {{ text-align: center; color: #57606a }} .a {{ color: {_COLORS["a"]} }} .b {{ color: {_COLORS["b"]} }}
</style></head><body>
<h1><span class="a">{a}</span> (A) and <span class="b">{b}</span> (B)</h1>
<p class="verdict" id="verdict">{html.escape(report.verdict.words)}</p>
<p>{html.escape(_floor_words(report))}</p>
<p>{html.escape(report.recommendation)}</p>
<table id="metrics"><tr><th>metric</th><th>A</th><th>B</th><th></th><th>B / A [95%]</th></tr>{rows}</table>
<h2>Same answers</h2>
<p id="sameness">{same.num_equal_pairs} of {same.num_pairs} answers equal, {_share(same.equal_tokens)} of tokens equal before the
first difference, {same.same_reasons} ended for the same reason.</p>
<h2>Plots</h2>
{"".join(plots)}
<h2>The client</h2>
<p>{100 * report.client.cpu:.0f}% of a core; its p99 delay in sending was {1e3 * report.client.lag_p99_s:.2f} ms.</p>
<h2>Effective settings</h2>
{_settings_table(report)}
<h2>The run</h2>
<table>{facts}</table>
</body></html>
"""


def _share(value: float) -> str:
    return "none" if math.isnan(value) else f"{100 * value:.1f}%"


def _floor_words(report: Report) -> str:
    if report.verdict.noise_floor is None:
        return ""
    floor, interval = 100 * report.verdict.noise_floor, report.verdict.interval
    blocks = "" if interval is None else f"; {interval.num_blocks} blocks of A B B A"
    return f"A against itself: up to {floor:.1f}% apart; nothing smaller is claimed{blocks}."


def _settings_table(report: Report) -> str:
    both = report.header.get("settings")
    if not isinstance(both, Sequence) or len(both) != 2:
        return "<p>not recorded</p>"
    a, b = both
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(a.get(name, '')))}</td>"
        f"<td>{html.escape(str(b.get(name, '')))}</td></tr>"
        for name in sorted({*a, *b})
    )
    return f"<table id='settings'><tr><th>setting</th><th>A</th><th>B</th></tr>{rows}</table>"


_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 440, 260, 54, 34


def _plot(
    caption: str,
    lines: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    x_name: str,
    y_name: str,
    *,
    dots: bool = False,
) -> str:
    """Draw lines of (x, y) by arm, axes from 0, four ticks each."""
    points = [point for _, line in lines for point in line if all(map(math.isfinite, point))]
    if not points:
        return ""
    x_max = max(x for x, _ in points) or 1.0
    y_max = max(y for _, y in points) or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + x / x_max * (_WIDTH - _LEFT - 12),
            _HEIGHT - _BOTTOM - y / y_max * (_HEIGHT - _BOTTOM - 12),
        )

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" font-size="11">']
    for i in range(5):
        x, y = at(x_max * i / 4, y_max * i / 4)
        base_x, base_y = at(0, 0)
        parts.append(
            f'<line x1="{base_x:.1f}" y1="{y:.1f}" x2="{_WIDTH - 12}" y2="{y:.1f}" stroke="#d0d7de"/>'
            f'<text x="{base_x - 4:.1f}" y="{y + 4:.1f}" text-anchor="end">{y_max * i / 4:.3g}</text>'
            f'<text x="{x:.1f}" y="{base_y + 14:.1f}" text-anchor="middle">{x_max * i / 4:.3g}</text>'
        )
    parts.append(
        f'<text x="{(_WIDTH + _LEFT) / 2}" y="{_HEIGHT - 4}" text-anchor="middle">{html.escape(x_name)}</text>'
        f'<text x="12" y="{_HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 12 {_HEIGHT / 2})">'
        f"{html.escape(y_name)}</text>"
    )
    for arm, line in lines:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in line))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{_COLORS[arm]}" stroke-width="1.6"/>')
        if dots:
            parts.extend(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{_COLORS[arm]}"/>'
                for x, y in (at(*point) for point in line)
            )
    parts.append("</svg>")
    return f"<figure>{''.join(parts)}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _cumulative_plot(data: RunData, metric: str, title: str) -> str:
    lines = []
    for arm in ("a", "b"):
        values = sorted(
            value
            for record in data.records
            if record.phase == "main" and record.arm == arm and not record.error
            for value in analysis.latency_values(record, metric)
        )
        if values:
            quantiles = np.linspace(0, 0.995, 120)
            lines.append((arm, [(1e3 * float(np.quantile(values, q)), 100 * float(q)) for q in quantiles]))
    return _plot(f"{title}: share of requests within", lines, "ms", "%")


def _by_arm(rungs: Sequence[analysis.Rung]) -> dict[str, list[analysis.Rung]]:
    return {arm: [rung for rung in rungs if rung.arm == arm] for arm in ("a", "b")}


def _ladder_plot(rungs: Sequence[analysis.Rung]) -> str:
    lines = [(arm, [(r.rate, r.goodput) for r in mine]) for arm, mine in _by_arm(rungs).items()]
    return _plot(
        "goodput over offered rate", lines, "requests/s offered", "requests/s within limits", dots=True
    )


def _pareto_plot(rungs: Sequence[analysis.Rung]) -> str:
    lines = [
        (arm, sorted((1e3 * r.ttft_p99_s, r.tokens_per_s) for r in mine))
        for arm, mine in _by_arm(rungs).items()
    ]
    return _plot("throughput against latency", lines, "TTFT p99, ms", "tokens/s", dots=True)
