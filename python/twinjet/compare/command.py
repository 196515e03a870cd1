"""`twinjet compare`: run, or judge again, and write what was found."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from twinjet.client import AsyncClient
from twinjet.compare.analysis import Settings, Slo
from twinjet.compare.driver import Driver, Progress
from twinjet.compare.effective import PROBE_TEXT, differences, effective_settings, objections
from twinjet.compare.records import Journal, RunData, read_run
from twinjet.compare.report import Report, as_csv, as_html, as_text, make_report
from twinjet.compare.statistics import Precision
from twinjet.compare.targets import ClientTarget, connect, parse_side
from twinjet.compare.workload import Load, WorkItem, Workload, read_prompts, read_trace, synthetic
from twinjet.errors import ConfigError
from twinjet.progress import Progress as Line
from twinjet.request import SamplingOverrides

DATA, PAGE, TABLE = "run.jsonl", "report.html", "metrics.csv"
_ENOUGH_ITEMS = 4096
"""Synthetic requests made; a longer run goes through them again, with other places in the prefix cache."""


def run(arguments: argparse.Namespace) -> int:
    """Run the command; its exit code: 0 with a verdict, 1 if not comparable. Raises ConfigError."""
    slo, prices = _slo(arguments.slo), _prices(arguments.recommend)
    _rates(arguments.ladder)
    if arguments.a == "report":
        folder = Path(arguments.b)
        data = read_run(folder / DATA if folder.is_dir() else folder)
        return _finish(data, arguments, folder if folder.is_dir() else folder.parent, slo, prices)
    folder = arguments.resume or arguments.out or Path(time.strftime("compare-%Y%m%d-%H%M%S"))
    data = asyncio.run(_measure(arguments, folder))
    return _finish(data, arguments, folder, slo, prices)


def _finish(
    data: RunData, arguments: argparse.Namespace, folder: Path, slo: Slo, prices: tuple[float, float] | None
) -> int:
    settings = Settings(metric=str(data.header["metric"]))  # type: ignore[arg-type]
    report = make_report(data, settings, slo=slo, prices=prices)
    (folder / PAGE).write_text(as_html(report, data), encoding="utf-8")
    (folder / TABLE).write_text(as_csv(report), encoding="utf-8")
    if arguments.json:
        print(json.dumps(_as_json(report)))
    else:
        print(as_text(report))
        print(f"page: {folder / PAGE}")
    return 1 if report.verdict.outcome == "not_comparable" else 0


def _as_json(report: Report) -> Mapping[str, Any]:
    return {
        "verdict": asdict(report.verdict),
        "metrics": [asdict(row) for row in report.rows],
        "sameness": asdict(report.sameness),
        "client": asdict(report.client),
        "ladder": [asdict(rung) for rung in report.rungs],
        "recommendation": report.recommendation,
        "run": dict(report.header),
    }


async def _measure(arguments: argparse.Namespace, folder: Path) -> RunData:
    address_a, model_a = parse_side(arguments.a, arguments.address)
    address_b, model_b = parse_side(arguments.b, arguments.address)
    load, precision = _load(arguments), _precision(arguments)
    token = os.environ.get("TWINJET_TOKEN", "")
    async with connect(address_a, token) as client_a, connect(address_b, token) as client_b:
        settings_a, settings_b = [
            effective_settings(
                await client.get_model(model), (await client.tokenize(PROBE_TEXT, model=model)).token_ids
            )
            for client, model in ((client_a, model_a), (client_b, model_b))
        ]
        found = differences(settings_a, settings_b)
        if stopping := objections(found, arguments.allow):
            told = "; ".join(f"{d.name}: {d.a or 'unknown'} and {d.b or 'unknown'}" for d in stopping)
            raise ConfigError(f"the two differ in {told}. Make them equal, or allow each by --allow NAME")
        workload = _workload(arguments, int(settings_a["vocab_size"]))
        metric = arguments.metric or ("e2e" if load.is_open else "token_time")
        header = {
            "names": _names(arguments),
            "digest": workload.digest,
            "metric": metric,
            "load": asdict(load),
            "requests_per_leg": arguments.requests,
            "precision": arguments.precision,
            "max_blocks": arguments.max_blocks,
            "seed": arguments.seed,
            "settings": [settings_a, settings_b],
            "allowed": sorted(arguments.allow),
            "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {platform.system()} {platform.release()}",
            "python": platform.python_version(),
        }
        data, journal = _open_run(folder, header, resume=arguments.resume is not None)
        try:
            await _drive(
                arguments,
                client_a,
                client_b,
                (model_a, model_b),
                workload,
                load,
                precision,
                metric,
                data,
                journal,
            )
        except asyncio.CancelledError:
            print("\nended early; what was measured is kept: go on with --resume", file=sys.stderr)
        finally:
            journal.close()
    return data


def _names(arguments: argparse.Namespace) -> list[str]:
    if arguments.a == arguments.b:
        return [arguments.a, f"{arguments.b} (again)"]
    return [arguments.a, arguments.b]


def _precision(arguments: argparse.Namespace) -> Precision:
    most = arguments.max_blocks
    try:
        return Precision(arguments.precision / 100, min(10, most), most)
    except ValueError as error:
        raise ConfigError(f"--precision or --max-blocks: {error}") from None


async def _drive(
    arguments: argparse.Namespace,
    client_a: AsyncClient,
    client_b: AsyncClient,
    models: tuple[str, str],
    workload: Workload,
    load: Load,
    precision: Precision,
    metric: str,
    data: RunData,
    journal: Journal,
) -> None:
    with Line(sys.stderr) as line:

        def show(progress: Progress) -> None:
            what = {"self": "A against itself", "main": "A against B", "ladder": "ladder of rates"}[
                progress.phase
            ]
            line.update(
                f"{what}, block {progress.block + 1} of {progress.num_blocks}",
                progress.block / progress.num_blocks,
            )

        driver = Driver(
            ClientTarget("A", client_a, models[0]),
            ClientTarget("B", client_b, models[1]),
            workload,
            load,
            arguments.requests,
            precision,
            Settings(metric=metric),  # type: ignore[arg-type]
            journal,
            data,
            show,
            # Not seen before by the servers' prefix caches, so that a second run starts as the first did.
            salt=f"compare-{time.time_ns():x}",
            seed=arguments.seed,
        )
        await driver.run()
        for rate in _rates(arguments.ladder):
            await driver.run_phase("ladder", 2, rate)


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
    changed = [
        name for name, value in header.items() if data.header.get(name) != json.loads(json.dumps(value))
    ]
    if changed:
        raise ConfigError(f"{path} is of another run: {', '.join(changed)} differ")
    return data, Journal(path)


def _workload(arguments: argparse.Namespace, vocab_size: int) -> Workload:
    sampling = SamplingOverrides(
        temperature=arguments.temperature, top_p=arguments.top_p, top_k=arguments.top_k
    )
    if arguments.requests < 1:
        raise ConfigError(f"--requests {arguments.requests}: at least 1")
    items: tuple[WorkItem, ...]
    if arguments.prompts is not None:
        if arguments.max_tokens < 1:
            raise ConfigError(f"--max-tokens {arguments.max_tokens}: at least 1")
        items = read_prompts(arguments.prompts, max_tokens=arguments.max_tokens)
    else:
        shape = arguments.synthetic.split(",")
        if len(shape) != 2 or not all(part.strip().isdecimal() for part in shape):
            raise ConfigError(f"--synthetic {arguments.synthetic}: two numbers of tokens, IN,OUT")
        num_in, num_out = map(int, shape)
        items = synthetic(num_in, num_out, _ENOUGH_ITEMS, vocab_size=vocab_size, seed=arguments.seed)
    return Workload(items, fixed_length=not arguments.natural, sampling=sampling)


def _load(arguments: argparse.Namespace) -> Load:
    if arguments.rate is not None:
        return Load("poisson", rate=arguments.rate)
    if arguments.constant_rate is not None:
        return Load("constant", rate=arguments.constant_rate)
    if arguments.trace is not None:
        return Load("trace", trace=read_trace(arguments.trace))
    return Load("closed", concurrency=arguments.concurrency)


def _rates(text: str | None) -> list[float]:
    try:
        rates = [float(part) for part in (text or "").split(",") if part.strip()]
    except ValueError:
        raise ConfigError(f"--ladder {text}: numbers of requests a second, separated by commas") from None
    if not all(0 < rate < float("inf") for rate in rates):
        raise ConfigError(f"--ladder {text}: each rate must be above 0")
    return rates


def _slo(text: str | None) -> Slo:
    limits: dict[str, float] = {}
    for part in (text or "").split(","):
        if not part.strip():
            continue
        name, _, value = part.partition("=")
        try:
            limit = float(value)
        except ValueError:
            limit = -1.0
        if name.strip() not in {"ttft", "tpot", "itl"} or not 0 < limit < float("inf"):
            raise ConfigError(f"--slo {part}: ttft, tpot or itl, an equals sign and seconds above 0")
        limits[f"{name.strip()}_s"] = limit
    return Slo(**limits)


def _prices(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        a, b = (float(part) for part in text.split(","))
    except ValueError:
        a = b = -1.0
    if not (0 < a < float("inf") and 0 < b < float("inf")):
        raise ConfigError(f"--recommend {text}: two prices above 0, PRICE_A,PRICE_B")
    return a, b
