"""Twinjet and vLLM's own gRPC server, each on a real vLLM engine with the demo model: tokens a second, in turns.

    python bench/frontend/real.py --rounds 5 --out build/bench/real.json

All servers stand side by side; those that are not asked use no CPU. vLLM's gRPC server (peers.sh installs what it
needs) sends token ids and no text. Prints medians, and the median of the rounds' ratios to vLLM's.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import front_ends
from front_ends import PEERS, ROOT, Bench, FrontEnd, free_port, started
from mock_core import Control

ROWS = ("twinjet", "twinjet_native", "vllm_grpc")
TOP_P = {"greedy": 0.0, "top-p .95": 0.95}
NUM_TOKENS = 64
OPTIONS = {"max_model_len": 2048, "max_num_seqs": 64, "dtype": "float32"}


class RealBench(Bench):
    """Starts servers with engines instead of mocks."""

    def begin(self, name: str) -> FrontEnd:
        path = self.folder / f"{name}.control"
        control, port = Control.create(path), free_port()
        if name == "vllm_grpc":
            command = [
                str(PEERS / "bin/python"),
                "-c",
                "from vllm.entrypoints.launchers.grpc_server import main; main()",
            ]
            command += ["--model", str(self.model), "--host", "127.0.0.1", "--port", str(port)]
            for key, value in OPTIONS.items():
                command += [f"--{key.replace('_', '-')}", str(value)]
            command += ["--enforce-eager"]  # as Twinjet has it on the CPU
            process = self._spawn(name, command, {"VLLM_CPU_KVCACHE_SPACE": "1"})
            return FrontEnd(
                name, process, port, control, path, front_ends.SMG_PATH, "1.1", front_ends.smg_body
            )
        config = self.folder / f"{name}.toml"
        door = "native" if name == "twinjet_native" else "grpc"
        config.write_text(
            f'[server]\nport = {port}\ndoor = "{door}"\n[deployments.demo]\nmodel = "{self.model}"\n'
            "[deployments.demo.options]\n"
            + "".join(f"{key} = {json.dumps(value)}\n" for key, value in OPTIONS.items())
        )
        env = {"VLLM_CPU_KVCACHE_SPACE": "1"}
        command = [sys.executable, "-m", "twinjet.cli", "serve", "--config", str(config)]
        process = self._spawn(name, command, env)
        where = front_ends.TWINJET_PATH
        return FrontEnd(name, process, port, control, path, where, "2.3", front_ends.twinjet_body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--keep-logs", type=Path, default=None)
    parser.add_argument("--load", type=Path, default=ROOT / "build/bench/load")
    options = parser.parse_args()
    from twinjet.models.demo import demo_model

    runs: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-real-") as folder:
        bench = RealBench(options.keep_logs or Path(folder), demo_model(), options.load)
        with started(bench, options.rows.split(",")) as ends:
            bodies = {end.name: end.body for end in ends}
            # The first round warms up: kernels, allocators and prefix caches.
            for number in range(options.rounds + 1):
                for mode, top_p in TOP_P.items():
                    for streams in map(int, options.streams.split(",")):
                        # Who comes first changes, so that no row always follows the same one.
                        for end in ends[number % len(ends) :] + ends[: number % len(ends)]:
                            end.body = functools.partial(bodies[end.name], top_p=top_p)
                            result = bench.load(end, NUM_TOKENS, streams, timeout=120)
                            if (
                                result["statuses"] != {"OK": streams}
                                or result["tokens"] != streams * NUM_TOKENS
                            ):
                                raise RuntimeError(f"{end.name}, {mode}, {streams} streams: {result}")
                            result["tokens_per_s"] = result["tokens"] / result["seconds"]
                            if number:
                                runs.setdefault(f"{mode} {streams} {end.name}", []).append(result)
    for name, found in runs.items():
        other = runs.get(f"{name.rpartition(' ')[0]} vllm_grpc", [])
        ratios = [a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(found, other, strict=False)]
        rate, first, gap = (
            statistics.median(values)
            for values in (
                [run["tokens_per_s"] for run in found],
                [run["ttft_ms"][0] for run in found],
                [run["gap_ms"][0] for run in found],
            )
        )
        ratio = f", {statistics.median(ratios):.2f} of vLLM's" if ratios else ""
        print(f"{name}: {rate:.0f} tokens/s{ratio}, first after {first:.0f} ms, gap {gap:.1f} ms")
    if options.out is not None:
        machine = {"cores": os.cpu_count(), "load": os.getloadavg()[2], "at": time.strftime("%Y-%m-%d")}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"machine": machine, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
