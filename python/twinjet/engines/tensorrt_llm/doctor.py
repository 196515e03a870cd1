"""`twinjet doctor`: what the installed tensorrt_llm is like, and what Twinjet does about it.

The first thing to run on a GPU machine, also as `python -m twinjet.engines.tensorrt_llm.doctor`. Without a model it
compares names and signatures; with one it builds the engine and tries what no signature tells. Its report is meant to
be sent to us: it holds no path but the model's, and no text of a prompt.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import logging
import platform
import sys
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from twinjet.engines.tensorrt_llm.front import features
from twinjet.engines.tensorrt_llm.report import Line, Report
from twinjet.engines.tensorrt_llm.surface import Difference, differences, load_contract, recorded_version
from twinjet.errors import ConfigError, TwinjetError


def examine(
    version: str | None = None,
    *,
    as_json: bool = False,
    model: str | None = None,
    options: Sequence[str] = (),
) -> int:
    """Print a report. version: the recorded one to compare with, None for the nearest.

    model: an engine is built for it and tried. options: its settings, each KEY=VALUE with a TOML value. Returns 0 if
    nothing fails, 1 if something does, 2 without the package, or with a wrong version or option.
    """
    contract = load_contract()
    if version is not None and version not in contract["versions"]:
        return _refuse(f"no version {version!r} is recorded; known: {', '.join(contract['versions'])}")
    if not features.is_installed():
        return _refuse(features.MISSING)
    try:
        module = importlib.import_module("tensorrt_llm")
        settings = _parse(options)
    except (ImportError, OSError, RuntimeError) as error:
        return _refuse(f"tensorrt_llm is installed but cannot be imported: {error}")
    except ValueError as error:
        return _refuse(str(error))
    installed = str(getattr(module, "__version__", "unknown"))
    version = version or recorded_version(installed, contract)
    lines = [*_surface_lines(differences(contract, version)), _defaults()]
    if model is not None and not any(line.verdict == "fails" for line in lines):
        lines += asyncio.run(_try(model, settings, contract, version))
    report = Report(installed, version, _environment(), lines)
    print(report.to_json() if as_json else report)
    return 1 if report.fails else 0


def run_doctor(argv: Sequence[str] | None = None) -> int:
    """Do as the command line says; see examine."""
    parser = argparse.ArgumentParser(
        prog="twinjet doctor", description="compare the installed tensorrt_llm with the recorded contract"
    )
    add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    arguments = parser.parse_args(argv)
    return run(arguments)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the doctor takes, without --json."""
    parser.add_argument("--recorded-version", metavar="V", help="default: the nearest to what is there")
    parser.add_argument("--model", metavar="M", help="build an engine for this model and try it (minutes)")
    parser.add_argument(
        "--option", metavar="KEY=VALUE", action="append", default=[], dest="options",
        help="an engine option for --model, the value in TOML; may be given several times",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Examine as parsed arguments say."""
    return examine(
        arguments.recorded_version, as_json=arguments.json, model=arguments.model, options=arguments.options
    )


def _refuse(reason: str) -> int:
    print(f"twinjet doctor: {reason}", file=sys.stderr)
    return 2


def _parse(options: Sequence[str]) -> dict[str, Any]:
    """Raise ValueError for what is no KEY=VALUE of TOML."""
    try:
        return tomllib.loads("\n".join(options))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"--option: {error}") from error


def _surface_lines(found: Sequence[Difference]) -> list[Line]:
    if not found:
        return [Line("names and signatures", "as recorded", "no differences")]
    effects = {
        "breaks": "the engine cannot be used",
        "limits": "what needs it is refused",
        "differs": "Twinjet does not rely on it",
    }
    return [
        Line(d.where, "fails" if d.severity == "breaks" else "differs", d.what, effects[d.severity])
        for d in found
    ]


def _defaults() -> Line:
    """Name what this version takes where nothing is set, of what matters here."""
    fields = getattr(features.find(["tensorrt_llm.llmapi.llm_args:TorchLlmArgs"]), "model_fields", {})
    cache = getattr(features.find(["tensorrt_llm.llmapi:KvCacheConfig"]), "model_fields", {})
    seen = [
        f"{name} {fields[name].default!r}" if name in fields else f"no {name}"
        for name in ("sampler_type", "enable_iter_perf_stats", "enable_chunked_prefill")
    ]
    manager = "use_kv_cache_manager_v2"
    seen.append(f"{manager} {cache[manager].default!r}" if manager in cache else f"no {manager}")
    hook = "logits_processor" in features.field_names(features.find(["tensorrt_llm:SamplingParams"]))
    return Line(
        "defaults", "as recorded" if hook else "fails", ", ".join([*seen, "hook" if hook else "no hook"])
    )


async def _try(model: str, options: dict[str, Any], contract: Mapping[str, Any], version: str) -> list[Line]:
    from twinjet.engines.tensorrt_llm.front.engine import TrtLlmEngine
    from twinjet.engines.tensorrt_llm.front.examination import Examination

    # What start-up logs is in the report, in order.
    logging.getLogger("twinjet").setLevel(logging.ERROR)
    # Events are looked at, too, unless the caller says otherwise.
    cache = {"event_buffer_max_size": 1024} | dict(options.get("kv_cache_config") or {})
    native = bool(options.pop("native_sampler", True))
    try:
        engine = TrtLlmEngine("doctor", model, options | {"kv_cache_config": cache}, native_sampler=native)
    except ConfigError as error:
        return [Line("start", "fails", str(error))]
    try:
        return await Examination(engine, contract["behaviours"], version).run()
    except TwinjetError as error:
        return [Line("start", "fails", str(error))]
    finally:
        await engine.stop()


def _environment() -> dict[str, str]:
    found = {"python": platform.python_version(), "system": platform.platform()}
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return found
    found["torch"] = str(torch.__version__)
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        found[f"gpu {index}"] = f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"
    return found


if __name__ == "__main__":
    sys.exit(run_doctor())
