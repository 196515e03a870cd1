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
from twinjet.compare.plots import Line, Plot
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
    answers: analysis.Answers
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
        if metric == "itl" and data.header.get("has_tokens") is False:
            continue
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
        analysis.answers(data),
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
    lines.extend(_answer_words(report.answers))
    if note := _record_words(report):
        lines.append(note)
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
    plots.append(_agreement_plot(data))
    if report.rungs:
        plots.append(_ladder_plot(report.rungs))
        plots.append(_throughput_plot(report.rungs))
        plots.append(_pareto_plot(report.rungs))
    rows = "".join(
        f"<tr><td>{html.escape(row.name)}</td><td>{row.a:.3f}</td><td>{row.b:.3f}</td>"
        f"<td>{row.unit}</td><td>{_ratio(row)}</td></tr>"
        for row in report.rows
    )
    facts = "".join(
        f"<tr><td>{html.escape(str(key))}</td><td>{html.escape(str(value))}</td></tr>"
        for key, value in report.header.items()
        if key not in {"settings", "flags"}
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{a} and {b} compared</title>
<link rel="icon" href="data:,">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: #1f2328 }}
h1 {{ font-size: 1.5rem }} .verdict {{ font-size: 1.25rem; padding: .8rem 1rem; background: #eef4ff; border-radius: 6px }}
table {{ border-collapse: collapse; margin: 1rem 0 }} td, th {{ padding: .25rem .8rem; border-bottom: 1px solid #d0d7de; text-align: right }}
td:first-child, th:first-child, td.text {{ text-align: left }} td.text {{ max-width: 22rem; white-space: pre-wrap }} figure {{ display: inline-block; margin: .5rem }}
figcaption {{ text-align: center; color: #57606a }} .a {{ color: {_COLORS["a"]} }} .b {{ color: {_COLORS["b"]} }}
</style></head><body>
<h1><span class="a">{a}</span> (A) and <span class="b">{b}</span> (B)</h1>
<p class="verdict" id="verdict">{html.escape(report.verdict.words)}</p>
<p>{html.escape(_floor_words(report))}</p>
<p>{html.escape(_record_words(report))}</p>
<p>{html.escape(report.recommendation)}</p>
<table id="metrics"><tr><th>metric</th><th>A</th><th>B</th><th></th><th>B / A [95%]</th></tr>{rows}</table>
<h2>Same answers</h2>
<p id="sameness">{"<br>".join(html.escape(line) for line in _answer_words(report.answers))}</p>
{_examples_table(report.answers.examples)}
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


def _answer_words(answers: analysis.Answers) -> list[str]:
    """Say how alike the answers are, a sentence a line; nothing where there are no answers."""
    both = answers.both
    if not both.num_pairs:
        return []
    kind = "natural lengths" if answers.is_natural else "of the speed run, fixed lengths"
    lines = [
        f"same answers ({kind}): {both.num_equal_pairs} of {both.num_pairs}, {_share(both.equal_tokens)} of tokens equal "
        f"before the first difference; {both.same_reasons} ended for the same reason"
    ]
    own = [
        f"{name} itself {one.num_equal_pairs} of {one.num_pairs} ({_share(one.equal_tokens)} of tokens)"
        for name, one in (("A", answers.own_a), ("B", answers.own_b))
        if one is not None and one.num_pairs
    ]
    if own:
        lines.append(f"asked again, each side repeats: {', '.join(own)}")
    if both.median_place is not None:
        margin = "not known (no logprobs, or not among the rivals)"
        if both.median_margin is not None and both.largest_margin is not None:
            margin = f"{both.median_margin:.3g} nats in the median, {both.largest_margin:.3g} at most"
        lines.append(f"first differences: at token {both.median_place} in the median; logit margin {margin}")
    if both.divergence is not None:
        lines.append(f"logprobs of equal tokens differ by {both.divergence:.2g} nats on average")
    ends = "; ".join(
        f"{name} " + ", ".join(f"{count} {reason}" for reason, count in counts.items())
        for name, counts in (("A", answers.reasons_a), ("B", answers.reasons_b))
    )
    lines.append(f"ended by: {ends}")
    if answers.valid_a is not None:
        lines.append(
            f"valid by the schema: A {answers.valid_a} of {answers.num_a}, B {answers.valid_b} of {answers.num_b}"
        )
    return lines


def _examples_table(examples: Sequence[analysis.Example]) -> str:
    if not examples:
        return ""
    rows = "".join(
        f"<tr><td>{e.index}</td><td>{e.place}</td><td>{'' if e.margin is None else f'{e.margin:.3g}'}</td>"
        f"<td class='text'>{html.escape(_cut(e.text_a))}</td><td class='text'>{html.escape(_cut(e.text_b))}</td></tr>"
        for e in examples
    )
    return (
        "<table id='examples'><tr><th>request</th><th>first different token</th><th>margin, nats</th><th>A</th><th>B</th></tr>"
        f"{rows}</table>"
    )


def _cut(text: str, most: int = 400) -> str:
    return text if len(text) <= most else text[:most] + " …"


def _record_words(report: Report) -> str:
    recorded = report.header.get("recorded")
    if not recorded:
        return ""
    return (
        f"B was not run beside A: it is {recorded}, recorded {report.header.get('recorded_at') or 'at a time not known'}. "
        "What else changed between the two runs does not cancel; the noise floor holds what each run drifted by itself."
    )


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
            points = [(1e3 * float(np.quantile(values, q)), 100 * float(q)) for q in quantiles]
            lines.append(Line(points, _COLORS[arm]))
    return Plot(f"{title}: share of requests within", "ms", "%", lines).figure()


def _agreement_plot(data: RunData) -> str:
    """Share of pairs that are still equal after so many tokens: A and B, and each side and its own second answer."""
    lines = []
    for name, color, places, is_dashed in analysis.agreement(data):
        if places:
            longest = max(length for _, length in places)
            points = []
            for n in range(longest + 1):
                alive = [place for place, length in places if length >= n]
                points.append((float(n), 100 * sum(place >= n for place in alive) / len(alive)))
            lines.append(Line(points, color, name, is_dashed))
    return Plot("answers equal so far", "tokens", "% of pairs", lines).figure()


def _by_arm(rungs: Sequence[analysis.Rung]) -> dict[str, list[analysis.Rung]]:
    return {arm: [rung for rung in rungs if rung.arm == arm] for arm in ("a", "b")}


def _ladder_plot(rungs: Sequence[analysis.Rung]) -> str:
    lines = [Line([(r.rate, r.goodput) for r in mine], _COLORS[arm]) for arm, mine in _by_arm(rungs).items()]
    return Plot(
        "goodput over offered rate", "requests/s offered", "requests/s within limits", lines, dots=True
    ).figure()


def _throughput_plot(rungs: Sequence[analysis.Rung]) -> str:
    lines = [
        Line([(r.rate, r.tokens_per_s) for r in mine], _COLORS[arm]) for arm, mine in _by_arm(rungs).items()
    ]
    return Plot("throughput over offered rate", "requests/s offered", "tokens/s", lines, dots=True).figure()


def _pareto_plot(rungs: Sequence[analysis.Rung]) -> str:
    lines = [
        Line(sorted((1e3 * r.ttft_p99_s, r.tokens_per_s) for r in mine), _COLORS[arm])
        for arm, mine in _by_arm(rungs).items()
    ]
    return Plot("throughput against latency", "TTFT p99, ms", "tokens/s", lines, dots=True).figure()
