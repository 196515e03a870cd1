"""Builds the CUDA side from this checkout, checks it on this machine's GPU and times it. Needs no network.

    python bench/gpu/run.py --out DIR [--architecture 90a-real] [--rows 10000000] [--quick]

Needs nvcc, cmake, ninja, a C++20 compiler, and a Python with torch (CUDA), pybind11 and numpy. Used where
there: matplotlib for the plot, FlashInfer for a comparison, compute-sanitizer for memory and race checks.
Writes report.json, report.png and log.txt to DIR, prints a summary, exits 1 if anything differs or fails.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "gpu"


class Runner:
    def __init__(self, out: Path) -> None:
        self.log = (out / "log.txt").open("w")
        self.started = time.monotonic()

    def run(self, name: str, command: list[str], limit_s: float, **env: str) -> tuple[int, str]:
        begin = time.monotonic()
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, **env},
                timeout=limit_s,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                check=False,
            )
            code, text = done.returncode, done.stdout
        except subprocess.TimeoutExpired as error:
            code, text = (
                124,
                (error.stdout or b"").decode(errors="replace") if isinstance(error.stdout, bytes) else "",
            )
        self.log.write(f"\n==== {name}: {' '.join(command)}\n{text}\n==== exit {code}\n")
        self.log.flush()
        print(
            f"[{time.monotonic() - self.started:6.1f} s] {name}: "
            f"exit {code}, {time.monotonic() - begin:.1f} s",
            flush=True,
        )
        return code, text


def build(runner: Runner, architecture: str) -> None:
    import pybind11

    code, text = runner.run(
        "configure",
        [
            "cmake",
            "-S",
            ".",
            "-B",
            str(BUILD),
            "-G",
            "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            "-DTWINJET_CUDA=ON",
            "-DTWINJET_GPU_TESTS=ON",
            "-DTWINJET_PYTHON=ON",
            f"-DTWINJET_CUDA_ARCHITECTURES={architecture}",
            "-DSKBUILD_PROJECT_VERSION=0.0.0",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ],
        120,
    )
    if code == 0:
        code, text = runner.run(
            "build",
            [
                "cmake",
                "--build",
                str(BUILD),
                "--target",
                "_core",
                "sampler_gpu_test",
                "kv_gpu_test",
                "sampler_gpu_bench",
                "-j",
                str(os.cpu_count() or 2),
            ],
            300,
        )
    if code != 0:
        sys.exit(text[-3000:])
    for module in (BUILD / "csrc" / "bindings").glob("_core*.so"):
        shutil.copy(module, ROOT / "python" / "twinjet")


def time_calls(torch: Any, calls: dict[str, Any], rounds: int = 7) -> dict[str, float]:
    """Microseconds a call, medians; each call captured in a graph, the rounds interleaved."""
    graphs: dict[str, tuple[Any, int]] = {}
    for name, (call, repeat) in calls.items():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            call(side.cuda_stream)
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            for _ in range(repeat):
                call(side.cuda_stream)
        graph.replay()
        graphs[name] = (graph, repeat)
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, (graph, repeat) in graphs.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) * 1000.0 / repeat)
    return {name: statistics.median(values) for name, values in times.items()}


def check_python(torch: Any) -> dict[str, Any]:
    """The Python face: CUDA tensors give the CPU's tokens, statuses and logprobs, bits and all."""
    import numpy as np

    from twinjet.sampling import Request, Sampler

    generator = torch.Generator().manual_seed(5)
    sampler = Sampler()
    rows = differences = 0
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for vocab_size in (1000, 32000, 128256):
            logits = (torch.randn(24, vocab_size, generator=generator) * 3).to(dtype)
            requests: list[list[Any]] = []
            for _ in range(2):
                requests.append(
                    [
                        Request(
                            vocab_size,
                            temperature=(0.0, 0.7, 1.0)[i % 3],
                            top_k=(0, 40, 0, 2000)[i % 4],
                            top_p=(1.0, 0.9)[i % 2],
                            min_p=(0.0, 0.02)[i // 2 % 2],
                            seed=i,
                            repetition_penalty=(1.0, 1.2)[i % 2],
                            frequency_penalty=(0.0, 0.3)[i // 3 % 2],
                            prompt_token_ids=list(range(i, 200 + i)),
                            logit_bias={7: 2.0, 9: -3.0} if i % 5 == 0 else None,
                            bad_words=[[3]] if i % 7 == 0 else None,
                            allowed_token_ids=range(900) if i % 11 == 0 else None,
                        )
                        for i in range(24)
                    ]
                )
            mask = torch.randint(
                -(2**31), 2**31 - 1, (24, (vocab_size + 31) // 32), generator=generator, dtype=torch.int64
            )
            mask = mask.to(torch.int32)
            for step in range(6):
                which = {"bitmask": mask} if step % 2 else {}
                mode = ("raw", "processed")[step // 2 % 2]
                host = sampler.sample(logits, requests[0], num_logprobs=5, logprobs_mode=mode, **which)
                which = {"bitmask": mask.cuda()} if step % 2 else {}
                device = sampler.sample(
                    logits.cuda(), requests[1], num_logprobs=5, logprobs_mode=mode, **which
                )
                assert host.logprobs is not None
                assert device.logprobs is not None
                same = (host.token_ids == device.token_ids) & (host.status == device.status)
                same &= (host.logprobs.token_ids == device.logprobs.token_ids).all(axis=1)
                same &= (
                    host.logprobs.logprobs.view(np.int32) == device.logprobs.logprobs.view(np.int32)
                ).all(axis=1)
                same &= host.logprobs.ranks == device.logprobs.ranks
                rows += len(same)
                differences += int((~same).sum())
    return {"rows": rows, "differences": differences}


PROFILED_CASES = {
    0: "greedy",
    1: "plain",
    2: "top_k 50",
    3: "top_p .95",
    4: "top_k 50, top_p .95",
    5: "min_p .05",
}
METRICS = {
    "gpu__time_duration.sum": "nanoseconds",
    "dram__bytes_read.sum": "bytes_read",
    "dram__bytes_write.sum": "bytes_written",
    "dram__bytes_read.sum.per_second": "bytes_read_per_second",
    "sm__inst_issued.avg.pct_of_peak_sustained_elapsed": "issue_slots_percent",
}


def profile(runner: Runner, bench: Path) -> list[dict[str, Any]]:
    """What ncu counts in one launch of 256 rows of 128,256, after a flush of the caches."""
    if not shutil.which("ncu"):
        return []
    results = []
    for number, name in PROFILED_CASES.items():
        command = ["ncu", "--clock-control", "none", "--csv", "--print-units", "base"]
        command += ["--kernel-name", "regex:Sample", "--launch-skip", "2", "--launch-count", "1"]
        command += ["--metrics", ",".join(METRICS), str(bench), "0", "128256", "256", str(number), "0"]
        _, text = runner.run(f"ncu {name}", command, 60)
        table = list(csv.DictReader(line for line in text.splitlines() if line.startswith('"')))
        counts = {METRICS[row["Metric Name"]]: float(row["Metric Value"].replace(",", "")) for row in table}
        results.append({"case": name, **counts})
    return results


def flashinfer_calls(flashinfer: Any, torch: Any, logits: Any) -> dict[str, Any]:
    """FlashInfer from logits to tokens, by each of its ways; a seed is given, so that a capture draws none."""
    seed = {"seed": 1, "offset": 0}
    probs = torch.softmax(logits, dim=-1)

    def plain(_stream: int) -> Any:
        return flashinfer.sampling_from_logits(logits, **seed)

    def top_p(_stream: int) -> Any:
        return flashinfer.top_p_sampling_from_probs(flashinfer.softmax(logits), 0.95, **seed)

    def top_p_alone(_stream: int) -> Any:
        return flashinfer.top_p_sampling_from_probs(probs, 0.95, **seed)

    def top_k_first(_stream: int) -> Any:
        return flashinfer.top_k_top_p_sampling_from_logits(logits, 50, 0.95, **seed)

    def joint(_stream: int) -> Any:
        return flashinfer.top_k_top_p_sampling_from_logits(
            logits, 50, 0.95, filter_apply_order="joint", **seed
        )

    calls = {
        "flashinfer plain": plain,
        "flashinfer top_p .95": top_p,
        "flashinfer top_p .95, softmax not counted": top_p_alone,
        "flashinfer top_k 50 + top_p .95": top_k_first,
        "flashinfer top_k 50 + top_p .95, joint": joint,
    }
    return {name: (call, 4) for name, call in calls.items()}


def compare_with_torch(torch: Any, batches: list[int], vocab_size: int) -> list[dict[str, Any]]:
    from twinjet.sampling import Request
    from twinjet.sampling.cuda import CudaSampler

    try:
        import flashinfer.sampling as flashinfer
    except ImportError:
        flashinfer = None
    results = []
    for batch in batches:
        logits = torch.randn(batch, vocab_size, device="cuda") * 2.5
        peaks = torch.randint(0, vocab_size, (batch, 128), device="cuda")
        logits.scatter_add_(1, peaks, 6 + 4 * torch.randn(batch, 128, device="cuda").abs())

        def sort_top_p(_stream: int, logits: Any = logits) -> Any:
            ordered, index = torch.sort(logits, dim=-1, descending=False)
            kept = torch.cumsum(torch.softmax(ordered, dim=-1), dim=-1) > 0.05
            kept[:, -1] = True
            masked = torch.where(kept, ordered, float("-inf"))
            probs = torch.softmax(torch.empty_like(logits).scatter_(1, index, masked), dim=-1)
            return (probs / torch.empty_like(probs).exponential_(1.0)).argmax(dim=-1)

        def plain(_stream: int, logits: Any = logits) -> Any:
            probs = torch.softmax(logits, dim=-1)
            return (probs / torch.empty_like(probs).exponential_(1.0)).argmax(dim=-1)

        calls: dict[str, Any] = {"torch plain": (plain, 8), "torch sort top_p .95": (sort_top_p, 2)}
        for name, params in (
            ("plain", {}),
            ("top_k 50", {"top_k": 50}),
            ("top_p .95", {"top_p": 0.95}),
            ("top_k 50 + top_p .95", {"top_k": 50, "top_p": 0.95}),
        ):
            sampler = CudaSampler()
            outputs = sampler.allocate(logits)
            sampler.prepare([Request(vocab_size, seed=i, **params) for i in range(batch)], vocab_size)

            def ours(
                stream: int, sampler: Any = sampler, outputs: Any = outputs, logits: Any = logits
            ) -> None:
                sampler.launch(logits, outputs, stream=stream)

            calls[f"twinjet {name}"] = (ours, 8)
        torch.cuda.synchronize()
        if flashinfer is not None:
            calls.update(flashinfer_calls(flashinfer, torch, logits))
        for name, us in time_calls(torch, calls).items():
            results.append(
                {"batch": batch, "vocab_size": vocab_size, "what": name, "microseconds": round(us, 2)}
            )
    return results


def plot(report: dict[str, Any], path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 6))
    for what in dict.fromkeys(r["what"] for r in report["torch"]):
        points = [(r["batch"], r["microseconds"]) for r in report["torch"] if r["what"] == what]
        style = {"torch": ":", "flashinfer": "--"}.get(what.split()[0], "-")
        axes.plot(*zip(*points, strict=True), style, marker="o", label=what)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="batch (rows of 128,256 logits, float32)",
        ylabel="microseconds a draw",
        title=report["device"],
    )
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--architecture", default="90a-real")
    parser.add_argument("--rows", type=int, default=10_500_000)
    parser.add_argument("--quick", action="store_true", help="fewer sizes in the benchmark")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    runner = Runner(options.out)
    build(runner, options.architecture)
    sys.path.insert(0, str(ROOT / "python"))
    import torch

    programs = BUILD / "tests" / "gpu"
    properties = torch.cuda.get_device_properties(0)
    _, smi = runner.run("driver", ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], 30)
    report: dict[str, Any] = {
        "device": properties.name,
        "driver": smi.strip(),
        "torch": [],
        "checks": {},
        "date": time.strftime("%Y-%m-%d"),
        "torch_version": torch.__version__,
    }
    checks = report["checks"]

    def save() -> None:
        (options.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")

    code, text = runner.run(
        "identity", [str(programs / "sampler_gpu_test")], 240, TWINJET_GPU_ROWS=str(options.rows)
    )
    print(text)
    checks["sampler_gpu_test"] = code
    report["identity"] = [line.strip() for line in text.splitlines() if "rows drawn" in line]
    checks["kv_gpu_test"], text = runner.run("kv", [str(programs / "kv_gpu_test")], 60)
    print(text)
    if shutil.which("compute-sanitizer"):
        # synccheck reports a missing wait in the first launch with clusters of 16 (more than all devices
        # promise), for barriers that all threads wait on; with clusters of up to 8 it must be silent.
        # What a tool's slowness brings to light depends on the rows: several seeds, each of seconds.
        for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
            largest = {"TWINJET_GPU_MAX_CLUSTER": "8"} if tool == "synccheck" else {}
            runs = [("sampler_gpu_test", str(seed)) for seed in range(1, 9)] + [("kv_gpu_test", "1")]
            for program, seed in runs:
                command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
                code, text = runner.run(
                    f"{tool} {program} {seed}",
                    [*command, str(programs / program), "", seed],
                    60,
                    TWINJET_GPU_SMALL="1",
                    **largest,
                )
                checks[f"{tool} {program} {seed}"] = code
                print("\n".join(text.splitlines()[-1:]))
    report["python"] = check_python(torch)
    checks["python"] = report["python"]["differences"]
    print("python face:", report["python"])
    sizes, batches = ("128256", "1,256") if options.quick else ("32000,128256,262144", "1,32,256,1024")
    code, text = runner.run("bench", [str(programs / "sampler_gpu_bench"), "0", sizes, batches], 150)
    checks["bench"] = code
    report["kernel"] = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    cells = ["0", sizes, "256" if options.quick else "256,1024", "0,1,2,3,4,5,6", "0", "2"]
    code, text = runner.run("bench 16-bit", [str(programs / "sampler_gpu_bench"), *cells], 100)
    checks["bench 16-bit"] = code
    # The first line of each is the copy bandwidth.
    report["kernel"] += [json.loads(line) for line in text.splitlines() if line.startswith("{")][1:]
    save()  # what is there, should the rest be cut off
    report["profile"] = profile(runner, programs / "sampler_gpu_bench")
    report["torch"] = compare_with_torch(torch, [int(b) for b in batches.split(",")], 128256)
    save()
    plot(report, options.out / "report.png")
    for r in report["kernel"][1:]:
        print(
            f"{r['vocab_size']:7} x {r['batch']:5} {r['logits']:9} {r['dtype']:8} {r['case']:22} "
            f"{r['microseconds']:9.1f} us {100 * r['share_of_copy_bandwidth']:5.1f}%"
        )
    for r in report["profile"]:
        print("ncu", r)
    for r in report["torch"]:
        print(f"{r['batch']:5} {r['what']:42} {r['microseconds']:9.1f} us")
    failed = {name: code for name, code in checks.items() if code != 0}
    print("failed:" if failed else "all checks passed", failed or "")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
