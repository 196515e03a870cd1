"""What makes the host wait in decode steps, by mode of sampling, inside vLLM on a GPU.

    PYTHONPATH=python python tests/gpu/synchronisations.py [--runner v1|v2] [--steps 2000] [--json FILE]

Needs vLLM's CUDA build and the extension with its CUDA side. Runs the demo model in this process, eight streams a mode,
with VLLM_GPU_SYNC_CHECK=warn, by which vLLM names each synchronisation within a step, and reads the sampler's own
counters, which see the waits that are no torch call. Prints both by mode; exits 1 if anything waited.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

DRAWN = {"temperature": 0.8}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": DRAWN,
    "seeded": {**DRAWN, "seed": 12345},
    "top-k": {**DRAWN, "top_k": 50},
    "top-p": {**DRAWN, "top_p": 0.95},
    "top-k + top-p": {**DRAWN, "top_k": 50, "top_p": 0.95},
    "min-p": {**DRAWN, "min_p": 0.05},
    "penalties": {**DRAWN, "frequency_penalty": 0.2, "presence_penalty": 0.1, "repetition_penalty": 1.1},
    "bias": {**DRAWN, "logit_bias": {11: 2.0, 900: -3.0}},
    "min_tokens": {**DRAWN, "min_tokens": 1_000_000, "stop_token_ids": (11,)},
    "logprobs": {**DRAWN, "logprobs": 5},
    "allowed ids": {**DRAWN, "allowed_token_ids": tuple(range(100, 40_000))},
    "bad words": {**DRAWN, "bad_words": ("the", " and", "\n\n")},
    "structured": DRAWN,
    "structured, logprobs": {**DRAWN, "logprobs": 5},
    "structured, bad words": {**DRAWN, "bad_words": ("the", " and", "ab")},
}
STREAMS = 8
# A text that no token may end.
ENDLESS = 'root ::= "{" word\nword ::= [a-z ] word'


class Warned:
    """Counts what vLLM warns of while a mode runs, by message and the line of ours or vLLM's that it names."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        warnings.showwarning = self._note  # type: ignore[assignment]

    def _note(self, message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
        if "called a synchronizing" in str(message) or "silently synchronous" in str(message):
            self.found[f"{str(message).splitlines()[0][:100]} at {filename}:{lineno}"] += 1


def make_engine(model: Path, steps: int) -> Any:
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor.abstract import Executor

    from twinjet.engines.vllm import config
    from twinjet.engines.vllm.front import parts

    made = config.engine_config(
        str(model),
        {
            "max_model_len": steps + 256, "max_num_seqs": 64, "gpu_memory_utilization": 0.05,
            "kv_cache_memory_bytes": 2_000_000_000,
        },
        scheduler_cls=parts.SCHEDULER,
        worker_cls=parts.WORKER,
    )  # fmt: skip
    return LLMEngine(made, Executor.get_class(made), log_stats=True, multiprocess_mode=False, stat_loggers=[])


def add(engine: Any, mode: str, index: int, steps: int, texts: Any) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    from twinjet.engines.vllm.front.params import sampling_params
    from twinjet.request import Sampling

    wanted = {
        "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
        "frequency_penalty": 0.0, "presence_penalty": 0.0, "logit_bias": {}, "n": 1, "min_tokens": 0,
        "stop": (), "stop_token_ids": (), "include_stop": False, "ignore_eos": True, "bad_words": (),
        "allowed_token_ids": (), "logprobs": None, "prompt_logprobs": None, "skip_special_tokens": True,
        "constraint": None, "seed": index + 1, "max_tokens": steps,
    } | MODES[mode]  # fmt: skip
    wanted["min_tokens"] = min(wanted["min_tokens"], steps)
    banned = texts.settings(wanted["bad_words"], skips_special=True) if wanted["bad_words"] else None
    params = sampling_params(Sampling(**wanted), 0, native=True, bad_text=banned)
    if mode.startswith("structured"):
        params.structured_outputs = StructuredOutputsParams(grammar=ENDLESS)
    prompt = {"prompt_token_ids": [100 + index * 7 + i for i in range(16)], "type": "token"}
    request = engine.input_processor.process_inputs(
        f"{mode}-{index}", prompt, params, engine.get_supported_tasks()
    )
    engine.input_processor.assign_request_id(request)
    engine.engine_core.add_request(request)


def run(core: Any) -> int:
    """Step until nothing is left; gives the steps in which all streams got a token."""
    steps = 0
    while core.scheduler.has_requests() or core.batch_queue:
        outputs, was_executed = core.step_fn()
        core.post_step(was_executed)
        steps += sum(len(o.new_token_ids) for b in (outputs or {}).values() for o in b.outputs) == STREAMS
    return steps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runner", choices=["v1", "v2"], default="v2")
    parser.add_argument("--steps", type=int, default=2000, help="of each mode")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ |= {
        "VLLM_GPU_SYNC_CHECK": "warn", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": str(int(options.runner == "v2")),
    }  # fmt: skip
    warned = Warned()
    from twinjet.models.demo import demo_model
    from twinjet.models.token_texts import TokenTextsFile
    from twinjet.models.tokenizer import HfTokenizer

    model = demo_model()
    texts = TokenTextsFile(HfTokenizer(model).vocabulary)
    engine = make_engine(model, options.steps)
    core = engine.engine_core.engine_core
    driver = core.model_executor.driver_worker
    drawing = getattr(driver, "worker", driver).model_runner.sampler.drawing
    report: dict[str, Any] = {"runner": options.runner, "modes": {}}
    waited = False
    for mode in options.modes:
        warned.found.clear()
        before, begin = Counter(drawing.counters), time.monotonic()
        for index in range(STREAMS):
            add(engine, mode, index, options.steps, texts)
        steps = run(core)
        counts = Counter(drawing.counters)
        counts.subtract(before)
        waits = {k: v for k, v in counts.items() if v and k.startswith(("device_waits.", "stock_steps"))}
        seconds = time.monotonic() - begin
        print(
            f"{options.runner} {mode}: {steps} steps, rows drawn {counts['rows']}, waits {waits or 0}, "
            f"synchronisations {dict(warned.found) or 0}, {seconds:.0f} s",
            flush=True,
        )
        waited |= bool(waits or warned.found)
        report["modes"][mode] = {"steps": steps, "waits": waits, "synchronisations": dict(warned.found)}
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    texts.remove()
    return waited


if __name__ == "__main__":
    sys.exit(main())
