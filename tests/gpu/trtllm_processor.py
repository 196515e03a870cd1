"""TensorRT-LLM's logits processor on a GPU against the same processor on the CPU, and what a call costs.

    PYTHONPATH=python python tests/gpu/trtllm_processor.py --build 90a-real

Needs torch with CUDA, numpy and the extension with its CUDA side; --build makes that first (see
bench/gpu/run.py for what it needs). It calls the processor as the PyTorch backend does; TensorRT-LLM itself is
not needed. Prints the number of differences and microseconds a call; exits 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
PROMPT = [5, 6, 7, 8, 9, 5]
NUM_STEPS = 10
PADDING = 64
MODES = ("on the device", "waiting at once", "copied to the CPU")


class RandomMasks:
    """A grammar that allows other random tokens at each step; the same ones for the same seed."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def matcher(self) -> RandomMasks:
        self._random = np.random.default_rng(9)
        return self

    def bitmask(self) -> Any:
        words = (self.vocab_size + 31) // 32
        return self._random.integers(-(2**31), 2**31, (1, words), dtype=np.int64).astype(np.int32)

    def accept(self, token_id: int) -> bool:
        return token_id >= 0


def settings(vocab_size: int, **changes: Any) -> Any:
    from twinjet.engines.tensorrt_llm.worker.logits import DrawSettings

    base: dict[str, Any] = {
        "key": 1, "report_path": "", "vocab_size": vocab_size, "num_prompt_tokens": len(PROMPT),
        "output_index": 0, "seed": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0,
        "repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0, "logit_bias": {},
        "allowed_token_ids": (), "bad_text": None, "min_tokens": 0, "max_tokens": NUM_STEPS,
        "end_token_ids": (2,), "fault_token_id": 2, "num_logprobs": None,
    }  # fmt: skip
    return DrawSettings(**base | changes)


def grid(vocab_size: int) -> Iterator[dict[str, Any]]:
    shapes: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {},
        {"temperature": 0.7, "top_k": 40},
        {"temperature": 1.3, "top_p": 0.9},
        {"top_k": 2000, "top_p": 0.95, "min_p": 0.01},
        {"top_p": 0.95, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2},
        {"top_k": 5, "logit_bias": {7: 20.0, 9: -3.0}, "min_tokens": 4},
        {"allowed_token_ids": tuple(range(2, 60)), "repetition_penalty": 1.1},
        {"allowed_token_ids": (2,), "logit_bias": {2: -5.0}},
    ]
    for number, shape in enumerate(shapes):
        for num_logprobs in (None, 0, 20):
            for grammar in (None, RandomMasks(vocab_size)):
                yield {**shape, "seed": number + 11, "num_logprobs": num_logprobs, "grammar": grammar}


class Frames:
    """Takes the place of the way back to the server."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []

    def send(self, frame: bytes) -> None:
        # A target's frame (kind 2) differs between the two by design.
        if struct.unpack_from("<B", frame)[0] != 2:
            self.frames.append(frame)


def drive(processor: Any, rows: Any, lag: int) -> list[int]:
    tokens: list[int] = []
    for row in rows:
        logits = row.clone().view(1, 1, -1)
        processor(7, logits, [PROMPT + tokens[: max(0, len(tokens) - lag)]], None, None)
        kept = (logits.reshape(-1) > -torch.inf).nonzero().reshape(-1).tolist()
        if len(kept) != 1 or float(logits.max()) != 0:
            raise AssertionError(f"{len(kept)} tokens left admissible")
        tokens.append(kept[0])
    settle([processor])
    return tokens


def settle(processors: list[Any]) -> None:
    for processor in processors:
        if processor._finishing is not None:
            processor._finishing.result()


def check(dtypes: list[torch.dtype], vocab_sizes: list[int]) -> tuple[int, int]:
    """Count draws, and runs whose tokens, reports or faults differ."""
    from twinjet.engines.tensorrt_llm.worker import device_draw, logits

    num_draws = num_different = 0
    generator = torch.Generator().manual_seed(3)
    stream = torch.cuda.Stream()
    for vocab_size in vocab_sizes:
        for dtype in dtypes:
            rows = (torch.randn(NUM_STEPS, vocab_size + PADDING, generator=generator) * 4).to(dtype)
            on_device = rows.cuda()
            torch.cuda.synchronize()
            for number, changes in enumerate(grid(vocab_size)):
                found = []
                for where, data in (("cuda", on_device), ("cpu", rows)):
                    frames = Frames()
                    logits.reporter = lambda _, frames=frames: frames  # type: ignore[assignment]
                    processor = logits.DrawProcessor(settings(vocab_size, **changes))
                    with torch.inference_mode(), torch.cuda.stream(stream):
                        row = data[0, :vocab_size]
                        if device_draw.can_draw(row, changes["num_logprobs"]) != (where == "cuda"):
                            raise AssertionError(f"a row on {where} takes the other path")
                        # On the CPU, 16-bit rows are widened, as rows copied from a GPU are.
                        tokens = drive(processor, data if where == "cuda" else data.float(), number % 2)
                    found.append((tokens, frames.frames))
                num_draws += NUM_STEPS
                if found[0] != found[1]:
                    num_different += 1
                    print(f"differs: {vocab_size} {dtype} {changes}", file=sys.stderr)
    return num_draws, num_different


def busy_device(milliseconds: float) -> Callable[[], None]:
    """Make a call that gives the device that much to do, as a forward pass would."""
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(3):
        begin.record()
        for _ in range(20):
            a @ a
        end.record()
        end.synchronize()
    count = max(1, round(milliseconds / (begin.elapsed_time(end) / 20)))

    def run() -> None:
        for _ in range(count):
            a @ a

    return run


def measure(batch: int, vocab_size: int, forward_ms: float, mode: str, **changes: Any) -> float:
    """Milliseconds a step of `batch` rows after a forward pass, the median of 15."""
    from twinjet.engines.tensorrt_llm.worker import device_draw, logits

    logits.reporter = lambda _: Frames()  # type: ignore[assignment]
    real = device_draw.can_draw
    if mode == MODES[2]:
        device_draw.can_draw = lambda row, num: False  # type: ignore[assignment]
    forward = busy_device(forward_ms) if forward_ms else lambda: None
    source = torch.randn(batch, vocab_size, device="cuda") * 4
    processors = [
        logits.DrawProcessor(settings(vocab_size, seed=i, max_tokens=1000, end_token_ids=(), **changes))
        for i in range(batch)
    ]
    tokens: list[list[int]] = [[] for _ in processors]
    times = []
    try:
        with torch.inference_mode():
            for step in range(20):
                begin = time.perf_counter()
                data = source.clone()
                forward()
                for i, processor in enumerate(processors):
                    processor(i, data[i].view(1, 1, -1), [PROMPT + tokens[i]], None, None)
                    if mode == MODES[1]:
                        settle([processor])
                    if step:
                        # What the overlap scheduler shows at the next call: all but the last token.
                        tokens[i].append(processor._state.tokens[step - 1])
                times.append(time.perf_counter() - begin)
            settle(processors)
            torch.cuda.synchronize()
    finally:
        device_draw.can_draw = real
    if any(processor._fault for processor in processors):
        raise AssertionError(processors[0]._fault)
    return float(np.median(times[5:])) * 1e3


def build(architecture: str) -> None:
    sys.path.insert(0, str(ROOT / "bench" / "gpu"))
    import run as bench

    bench.build(bench.Runner(Path(tempfile.mkdtemp(prefix="twinjet-"))), architecture)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", metavar="ARCHITECTURE", help="build the extension first, e.g. 90a-real")
    parser.add_argument("--json", type=Path, help="write the numbers there too")
    options = parser.parse_args()
    if options.build:
        build(options.build)
    sys.path.insert(0, str(ROOT / "python"))
    num_draws, num_different = check([torch.float32, torch.float16, torch.bfloat16], [1000, 32000, 128256])
    print(f"{num_draws} draws on {torch.cuda.get_device_name(0)}: {num_different} runs differ", flush=True)
    report: dict[str, Any] = {"draws": num_draws, "runs_that_differ": num_different, "steps": []}
    cases: list[tuple[str, dict[str, Any]]] = [
        ("greedy", {"temperature": 0.0}),
        ("top_p .95", {"top_p": 0.95}),
        ("penalties, 5 logprobs", {"top_p": 0.95, "repetition_penalty": 1.2, "num_logprobs": 5}),
    ]
    for forward_ms, batch in ((0.0, 1), (0.0, 64), (8.0, 1), (8.0, 32), (8.0, 128)):
        for name, changes in cases:
            ms = {mode: measure(batch, 128256, forward_ms, mode, **changes) for mode in MODES}
            report["steps"].append({"forward_ms": forward_ms, "rows": batch, "case": name, "step_ms": ms})
            listed = ", ".join(f"{mode} {value:.2f}" for mode, value in ms.items())
            print(f"forward {forward_ms:g} ms, {batch:3} rows, {name:22} ms a step: {listed}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if num_different else 0


if __name__ == "__main__":
    sys.exit(main())
