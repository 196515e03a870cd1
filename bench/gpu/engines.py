"""Twinjet's scheduler and sampler in vLLM beside stock vLLM, on one GPU: tokens a second while all streams decode.

    PYTHONPATH=python python bench/gpu/engines.py --out DIR [--shapes 1b] [--streams 1 32 256 1024] [--limit 560]

Needs vLLM's CUDA build and the extension with its CUDA side. For each shape one engine core of each kind runs,
and every cell's runs alternate between them. Stock draws with seeds, as Twinjet always does (top-k and top-p by its
own kernel, which is Qrita's), and without, by FlashInfer. Writes engines.json and engines.png, prints a table. --check
instead draws every row once more on the CPU, inside vLLM, and exits 1 if one differs. --settings names a JSON file of
more engines to time beside the two: {name: {"kinds": ["stock", "twinjet"], "options": {...}, "environment": {...}}}; the kinds
"scheduler" and "sampler" have that part of Twinjet alone.
"""

from __future__ import annotations

import argparse
import json
import selectors
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from engine_worker import MODES
from shapes import make_shape

TIMED = ("greedy", "temperature", "top-k + top-p", "top-p", "penalties", "logprobs")
KV_BYTES = {"1b": 6_000_000_000, "8b": 13_200_000_000}
NO_SEEDS = ", no seeds, FlashInfer"
SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]


class Engine:
    """A worker process and the pipe to it."""

    def __init__(self, name: str, spec: dict[str, Any], out: Path) -> None:
        self.name, self.error = name, ""
        log = (out / f"{name}.log").open("w")
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("engine_worker.py")), json.dumps(spec)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip

    def read(self, timeout_s: float | None = None) -> dict[str, Any]:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(timeout_s):
                self.error = "not started in time"
                return {"error": self.error}
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": f"exit {self._process.wait()}"}
        self.error = answer.get("error", "")
        return answer

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self.read()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        import torch
        import vllm

        self.options = options
        self.begin = time.monotonic()
        self.report: dict[str, Any] = {
            "device": torch.cuda.get_device_name(0), "torch": torch.__version__, "vllm": vllm.__version__,
            "date": time.strftime("%Y-%m-%d"), "engines": {}, "runs": [], "counters": {},
            "profiles": [], "arrivals": [],
        }  # fmt: skip
        self.settings = json.loads(options.settings.read_text()) if options.settings else {}
        self.report["settings"] = self.settings

    def start(self, shape: str, kinds: tuple[str, ...], folder: Path) -> dict[str, Engine]:
        """Engines by the name of what they draw with, "stock" or "twinjet", and of the settings behind it."""
        engines = {}
        wanted: list[tuple[str, str, dict[str, Any]]] = [(kind, "", {}) for kind in kinds]
        wanted += [(kind, name, s) for name, s in self.settings.items() for kind in s["kinds"]]
        for kind, name, settings in wanted:
            options = settings.get("options", {})
            compilation = {"cudagraph_capture_sizes": SIZES} | options.get("compilation_config", {})
            environment = dict(pair.split("=", 1) for pair in self.options.env)
            spec = {
                "model": str(make_shape(shape, folder)),
                "native": {"twinjet": "all", "stock": "off"}.get(kind, kind),
                "flashinfer": kind == "stock" and not self.options.no_flashinfer,
                "environment": environment | settings.get("environment", {}),
                "options": {
                    "load_format": "dummy", "skip_tokenizer_init": True, "gpu_memory_utilization": 0.2,
                    "kv_cache_memory_bytes": self.options.kv_bytes or KV_BYTES[shape],
                    **options, "compilation_config": compilation,
                },
            }  # fmt: skip
            drawn = kind + (f", {name}" if name else "")
            file = f"{shape}-{kind}" + (f"-{name.replace(' ', '-')}" if name else "")
            engines[drawn] = Engine(file, spec, self.options.out)
        for engine in engines.values():
            left = max(1.0, self.options.start_limit - self.elapsed()) if self.options.start_limit else None
            about = self.report["engines"][engine.name] = engine.read(left)
            print(f"[{self.elapsed():5.0f} s] {engine.name}: {about}", flush=True)
        return engines

    def elapsed(self) -> float:
        return time.monotonic() - self.begin

    def finish(self, engines: dict[str, Engine]) -> None:
        for engine in engines.values():
            if not engine.error:
                self.report["counters"][engine.name] = counters = engine.ask(counters=True)
                print(engine.name, counters, flush=True)
            engine.stop()
        (self.options.out / "engines.json").write_text(json.dumps(self.report, indent=1) + "\n")

    def compare(self, shape: str, folder: Path) -> None:
        options = self.options
        engines = self.start(shape, ("stock", "twinjet"), folder)
        for streams in options.streams:
            for number in range(-1, options.rounds):
                for mode in options.modes:
                    tokens = _tokens(options, streams, number)
                    for engine, variant in _variants(mode, number, engines):
                        if not engine.error and self.elapsed() < options.limit:
                            self.time(shape, engine, variant, mode, streams, tokens, number)
        self.serve(shape, engines)
        for drawn, engine in engines.items():
            for streams in options.profile:
                if not engine.error:
                    found = engine.ask(mode="greedy", streams=streams, tokens=64, prompt=32, profile=20)
                    self.report["profiles"].append(
                        {"shape": shape, "streams": streams, "draws": drawn, **found}
                    )
        self.finish(engines)

    def time(
        self,
        shape: str,
        engine: Engine,
        variant: dict[str, Any],
        mode: str,
        streams: int,
        tokens: int,
        number: int,
    ) -> None:
        """Take one run; that of a round below 0 is not kept."""
        run = engine.ask(mode=mode, streams=streams, tokens=tokens, prompt=32, round=number, **variant)
        if run.get("error"):
            print("error:", engine.name, mode, streams, run, flush=True)
        if number >= 0:
            about = {"shape": shape, "streams": streams, "mode": mode, "tokens": tokens}
            self.report["runs"].append({**about, **variant, **run})

    def serve(self, shape: str, engines: dict[str, Engine]) -> None:
        """Time streams of one token in turns, then tell how long the GPU is busy in a step of them."""
        options = self.options
        if not options.arrivals:
            return
        command = {"mode": "greedy", "streams": 512, "tokens": 1, "prompt": 32, "arrivals": 8192}
        for number in range(-1, options.arrivals):
            for drawn, engine in list(engines.items())[:: -1 if number % 2 else 1]:
                if not engine.error and self.elapsed() < options.limit:
                    found = engine.ask(**command, round=1000 + number)
                    if number >= 0:
                        self.report["arrivals"].append({"shape": shape, "draws": drawn, **found})
        for drawn, engine in engines.items():
            if not engine.error and self.elapsed() < options.limit:
                found = engine.ask(**command, round=2000, profile=10)
                self.report["profiles"].append({"shape": shape, "arrivals": 512, "draws": drawn, **found})
                if engine.error:
                    continue
                print(
                    f"{shape} arrivals, {drawn}: GPU busy for {found['busy_us']} of {found['step_us']} us a step"
                )

    def check(self, shape: str, folder: Path) -> int:
        engines = self.start(shape, ("twinjet",), folder)
        engine = engines["twinjet"]
        differences = rows = 0
        while rows < self.options.check and not engine.error and self.elapsed() < self.options.limit:
            for mode in MODES:
                answer = engine.ask(mode=mode, streams=256, tokens=64, prompt=32, check=True)
                rows, differences = answer.get("rows", rows), answer.get("differences", -1)
                print(f"[{self.elapsed():5.0f} s] {shape} {mode}: {answer}", flush=True)
        self.report["check"] = {"rows": rows, "differences": differences}
        self.finish(engines)
        return differences


def _tokens(options: argparse.Namespace, streams: int, number: int) -> int:
    """Of each stream in this round; the one that is not timed only brings everything up."""
    if number < 0:
        return min(16, int(options.tokens))
    return int(options.tokens * (options.few if streams <= 32 else 1))


def _variants(mode: str, number: int, engines: dict[str, Engine]) -> list[tuple[Engine, dict[str, Any]]]:
    """The draws that a mode is timed with, in an order that turns from round to round."""
    variants = [(engine, {"draws": drawn, "seeded": True}) for drawn, engine in engines.items()]
    if "top-" in mode:
        unseeded = {"seeded": False, "flashinfer": True}
        variants += [
            (engine, {"draws": drawn + NO_SEEDS, **unseeded})
            for drawn, engine in engines.items()
            if drawn.split(", ")[0] == "stock"
        ]
    return variants[::-1] if number % 2 else variants


def summarise(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Medians of each cell, with Twinjet's ratio to the fastest of stock's with the same settings, and with any."""
    cells: dict[tuple[Any, ...], dict[str, list[dict[str, Any]]]] = {}
    for run in report["runs"]:
        if not run.get("error"):
            key = (run["shape"], run["streams"], run["mode"], run.get("tokens"))
            cells.setdefault(key, {}).setdefault(run["draws"], []).append(run)
    summary = []
    for (shape, streams, mode, tokens), draws in cells.items():
        speed = {name: statistics.median(r["tokens_per_s"] for r in runs) for name, runs in draws.items()}
        spread = {
            name: [min(r["tokens_per_s"] for r in runs), max(r["tokens_per_s"] for r in runs)]
            for name, runs in draws.items()
        }
        ratios: dict[str, dict[str, float]] = {}
        fastest = max((value for name, value in speed.items() if name.startswith("stock")), default=None)
        for behind in ("", *(f", {name}" for name in report.get("settings", {}))):
            own = [speed[name] for name in (f"stock{behind}", f"stock{behind}{NO_SEEDS}") if name in speed]
            if own and fastest and f"twinjet{behind}" in speed:
                twinjet = speed[f"twinjet{behind}"]
                ratios[behind[2:]] = {
                    "same": round(twinjet / max(own), 3),
                    "any": round(twinjet / fastest, 3),
                }
        host = {}
        for name, runs in draws.items():
            parts = [r["host_us"] for r in runs]
            host[name] = {p: statistics.median(x[p] for x in parts) for p in parts[0]}
        summary.append(
            {
                "shape": shape, "streams": streams, "mode": mode, "tokens": tokens, "tokens_per_s": speed,
                "spread": spread, "ratio": ratios.get("", {}).get("same"), "ratios": ratios, "host_us": host,
            }
        )  # fmt: skip
    return summary


def summarise_arrivals(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Medians of the runs with streams of one token."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in report["arrivals"]:
        if not run.get("error"):
            groups.setdefault((run["shape"], run["draws"]), []).append(run)
    summary = []
    for (shape, drawn), runs in groups.items():
        speed = [run["streams_per_s"] for run in runs]
        cell = {"shape": shape, "draws": drawn, "spread": [min(speed), max(speed)]}
        for name in ("streams_per_s", "rows_a_step", "step_us", "on_core_us"):
            cell[name] = statistics.median(run[name] for run in runs)
        for name in ("host_us", "host_on_core_us"):
            cell[name] = {part: statistics.median(run[name][part] for run in runs) for part in runs[0][name]}
        summary.append(cell)
    return summary


def draw_plot(report: dict[str, Any], path: Path) -> None:
    """Ratios to the fastest of stock's draws, by streams."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = sorted({(cell["shape"], name) for cell in report["summary"] for name in cell["ratios"]})
    if not panels:
        return
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), 4.5), squeeze=False)
    for axis, (shape, settings) in zip(axes[0], panels, strict=True):
        for mode in TIMED:
            points = [
                (cell["streams"], cell["ratios"][settings]["same"])
                for cell in report["summary"]
                if cell["shape"] == shape and cell["mode"] == mode and settings in cell["ratios"]
            ]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=mode)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set(xscale="log", xlabel="streams", ylabel="tokens/s, Twinjet / stock")
        axis.set_title(shape.upper() + (f", {settings}" if settings else ""))
        axis.grid(visible=True, alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(f"{report['device']}, vLLM {report['vllm']}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", default=["1b", "8b"], choices=list(KV_BYTES))
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 32, 256, 1024])
    parser.add_argument("--modes", nargs="+", default=list(TIMED), choices=list(MODES))
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of a cell")
    parser.add_argument("--tokens", type=int, default=64, help="output tokens of a stream")
    parser.add_argument("--few", type=int, default=4, help="of at most 32 streams, so many times that")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no run begins")
    parser.add_argument("--check", type=int, metavar="ROWS", help="draw so many rows twice instead")
    parser.add_argument("--no-flashinfer", action="store_true", help="without FlashInfer's compilation")
    parser.add_argument("--settings", type=Path, help="more engines; see above")
    parser.add_argument(
        "--arrivals", type=int, default=0, metavar="ROUNDS", help="streams of one token too, 512 at a time"
    )
    parser.add_argument("--profile", type=int, nargs="+", default=[], help="streams to profile 20 steps of")
    parser.add_argument(
        "--kv-bytes", type=int, default=0, help="of each engine's cache; 0: for 1,024 streams"
    )
    parser.add_argument(
        "--start-limit", type=float, default=0, help="seconds by which engines must run; 0: none"
    )
    parser.add_argument("--env", nargs="*", default=[], metavar="NAME=VALUE", help="for the engines")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(options)
    with tempfile.TemporaryDirectory() as folder:
        for shape in options.shapes:
            if options.check:
                if bench.check(shape, Path(folder)) != 0:
                    return 1
            else:
                bench.compare(shape, Path(folder))
    if options.check:
        return 0
    bench.report["summary"] = summarise(bench.report)
    bench.report["arrivals_summary"] = summarise_arrivals(bench.report)
    (options.out / "engines.json").write_text(json.dumps(bench.report, indent=1) + "\n")
    draw_plot(bench.report, options.out / "engines.png")
    for cell in bench.report["summary"]:
        print(
            f"{cell['shape']:3} {cell['streams']:5} {cell['mode']:14} {cell['ratios']} {cell['tokens_per_s']} "
            f"host {cell['host_us']}",
            flush=True,
        )
    for cell in bench.report["arrivals_summary"]:
        print("arrivals", cell, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
