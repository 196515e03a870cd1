"""`twinjet compare`: run, or judge again, and write what was found."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from twinjet.compare import guidellm
from twinjet.compare.analysis import Settings, Slo
from twinjet.compare.display import make_display
from twinjet.compare.effective import check_equal
from twinjet.compare.flags import REQUEST_FLAGS, flags_of, plan_of, prices_of, rates_of, slo_of, take_flags
from twinjet.compare.plan import Plan, is_one_run
from twinjet.compare.records import Journal, RunData, read_run
from twinjet.compare.report import Report, as_csv, as_html, as_text, make_report
from twinjet.compare.sides import LiveSide, Side, open_side
from twinjet.errors import ConfigError

DATA, PAGE, TABLE, GUIDELLM = "run.jsonl", "report.html", "metrics.csv", "guidellm.json"
_INTERRUPTED = 130


def run(arguments: argparse.Namespace) -> int:
    """Run the command; its exit code: 0 with a verdict, 1 if not comparable, 130 ended early. Raises ConfigError."""
    slo, prices = slo_of(arguments.slo), prices_of(arguments.recommend)
    rates_of(arguments.ladder)
    if arguments.a == "report":
        return _judge_again(arguments, slo, prices)
    folder = arguments.resume or arguments.out or Path(time.strftime("compare-%Y%m%d-%H%M%S"))
    data, was_ended = asyncio.run(_measure(arguments, folder))
    code = _finish(data, arguments, folder, slo, prices)
    return _INTERRUPTED if was_ended else code


def _judge_again(arguments: argparse.Namespace, slo: Slo, prices: tuple[float, float] | None) -> int:
    source = Path(arguments.b)
    if source.suffix == ".json":
        data = guidellm.read_reports([source, *([] if arguments.other is None else [arguments.other])])
        return _finish(data, arguments, arguments.out, slo, prices)
    data = read_run(source / DATA if source.is_dir() else source)
    folder = arguments.out or (source if source.is_dir() else source.parent)
    return _finish(data, arguments, folder, slo, prices)


def _finish(
    data: RunData,
    arguments: argparse.Namespace,
    folder: Path | None,
    slo: Slo,
    prices: tuple[float, float] | None,
) -> int:
    settings = Settings(metric=str(data.header["metric"]))  # type: ignore[arg-type]
    report = make_report(data, settings, slo=slo, prices=prices)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PAGE).write_text(as_html(report, data), encoding="utf-8")
        (folder / TABLE).write_text(as_csv(report), encoding="utf-8")
        guidellm.write_report(data, folder / GUIDELLM)
    if arguments.json:
        print(json.dumps(_as_json(report)))
    else:
        print(as_text(report))
        if folder is not None:
            print(f"page: {folder / PAGE}")
    return 1 if report.verdict.outcome == "not_comparable" else 0


def _as_json(report: Report) -> Mapping[str, Any]:
    return {
        "verdict": asdict(report.verdict),
        "metrics": [asdict(row) for row in report.rows],
        "sameness": asdict(report.answers.both),
        "answers": asdict(report.answers),
        "client": asdict(report.client),
        "ladder": [asdict(rung) for rung in report.rungs],
        "recommendation": report.recommendation,
        "run": dict(report.header),
    }


async def _measure(arguments: argparse.Namespace, folder: Path) -> tuple[RunData, bool]:
    """Run what is missing; the data, and whether it was ended before all was done."""
    if arguments.resume is not None:
        # Read first: what is resumed is of the same requests, so its flags need not be given again.
        take_flags(arguments, read_run(folder / DATA).header)
    async with open_side(arguments.b, arguments.address) as b, open_side(arguments.a, arguments.address) as a:
        if not isinstance(a, LiveSide):
            raise ConfigError(f"{arguments.a}: A must be a model that runs; an earlier run can be B")
        if not isinstance(b, LiveSide):
            take_flags(arguments, b.header, REQUEST_FLAGS)
        settings_a, settings_b = await a.settings(), await b.settings()
        check_equal(settings_a, settings_b, arguments.allow)
        plan = plan_of(arguments, vocab_size=int(settings_a["vocab_size"]))
        header = plan.header(_names(arguments), (settings_a, settings_b))
        header |= {**b.header_of(plan, header), "flags": flags_of(arguments)}
        data, journal = _open_run(folder, header, resume=arguments.resume is not None)
        try:
            await _drive(arguments, plan, a, b, data, journal)
        except asyncio.CancelledError:
            print(f"ended early; what was measured is kept: go on with --resume {folder}", file=sys.stderr)
            return data, True
        finally:
            journal.close()
    return data, False


def _names(arguments: argparse.Namespace) -> tuple[str, str]:
    if arguments.a == arguments.b:
        return arguments.a, f"{arguments.b} (again)"
    return arguments.a, arguments.b


async def _drive(
    arguments: argparse.Namespace, plan: Plan, a: LiveSide, b: Side, data: RunData, journal: Journal
) -> None:
    has_logprobs = a.has_logprobs and b.has_logprobs
    running = plan.driver(a.target, b.target, data, journal, has_logprobs=has_logprobs, recorded=b.recorded)
    with make_display(_names(arguments), is_plain=arguments.json) as display:
        running.report, running.watch = display.progress, display.watch
        await plan.run(running)


def _open_run(folder: Path, header: Mapping[str, Any], *, resume: bool) -> tuple[RunData, Journal]:
    path = folder / DATA
    if not resume:
        if path.exists():
            raise ConfigError(f"{path} exists; name another folder by --out, or go on with it by --resume")
        folder.mkdir(parents=True, exist_ok=True)
        journal = Journal(path)
        journal.header(header)
        return RunData(header), journal
    data = read_run(path)
    if changed := is_one_run(data.header, header):
        raise ConfigError(f"{path} is of another run: {', '.join(changed)} differ")
    data.forget_partial_blocks()
    return data, Journal(path)
