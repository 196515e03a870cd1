"""Tokens a second of the vLLM engine with our sampler and with vLLM's, on the demo model.

Two engines stand side by side and take turns, so that noise of the machine meets both; an idle engine uses
no CPU. Reports medians and the median of the rounds' ratios; writes JSON.

    .venv/bin/python bench/serve_sampler_bench.py --rounds 5 --streams 32 --tokens 64
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from twinjet.engines.vllm.front import prestart

prestart.prestart()

from twinjet.engines.base import OutputEvent  # noqa: E402
from twinjet.engines.vllm.front.engine import VllmEngine  # noqa: E402
from twinjet.models.demo import DEMO_MODEL  # noqa: E402
from twinjet.request import EngineRequest, Sampling  # noqa: E402

NEUTRAL = Sampling(
    temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0, frequency_penalty=0.0,
    presence_penalty=0.0, logit_bias={}, seed=0, n=1, max_tokens=1, min_tokens=0, stop=(), stop_token_ids=(),
    include_stop=False, ignore_eos=True, bad_words=(), allowed_token_ids=(), logprobs=None,
    prompt_logprobs=None, skip_special_tokens=True, constraint=None,
)  # fmt: skip

MODES: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "temperature .8, top-p .95": {"temperature": 0.8, "top_p": 0.95},
    "temperature .8": {"temperature": 0.8},
}


async def tokens_per_second(
    engine: VllmEngine, mode: dict[str, float], streams: int, tokens: int, label: str
) -> float:
    """Run the streams at once, each from its own prompt; count tokens from start to last end."""
    from dataclasses import replace

    text = "Write a story about number"

    async def one(index: int) -> int:
        prompt = engine.tokenizer.encode(f"{text} {index}", add_special_tokens=False)
        sampling = replace(NEUTRAL, **mode, seed=index, max_tokens=tokens)
        request = EngineRequest(
            request_id=f"{label}-{index}", prompt_token_ids=tuple(prompt), sampling=sampling
        )
        return sum([len(e.token_ids) async for e in engine.generate(request) if isinstance(e, OutputEvent)])

    began = time.perf_counter()
    total = sum(await asyncio.gather(*(one(index) for index in range(streams))))
    return total / (time.perf_counter() - began)


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    options: dict[str, Any] = {"max_num_seqs": args.streams, "max_model_len": 2048}
    if args.dtype:
        options["dtype"] = args.dtype
    engines = {
        name: VllmEngine(
            name, args.model, options, native_sampler=name == "twinjet", native_block_manager=False
        )
        for name in ("vllm", "twinjet")
    }
    for engine in engines.values():
        await engine.start(lambda progress: None)
    found: dict[str, dict[str, list[float]]] = {mode: {name: [] for name in engines} for mode in MODES}
    for turn in range(args.rounds + 1):
        for mode, sampling in MODES.items():
            for name in list(engines)[:: 1 if turn % 2 else -1]:
                rate = await tokens_per_second(
                    engines[name], sampling, args.streams, args.tokens, f"{turn}-{mode}-{name}"
                )
                if turn:  # the first turn warms up
                    found[mode][name].append(rate)
    target = engines["twinjet"].describe().sampler.target
    for engine in engines.values():
        await engine.stop()
    return {
        "model": Path(args.model).name, "dtype": args.dtype, "cpus": os.cpu_count(), "target": target,
        "streams": args.streams, "tokens": args.tokens, "rounds": args.rounds,
        "modes": {
            mode: {
                **{f"{name}_tokens_per_s": statistics.median(rates) for name, rates in by_name.items()},
                "ratio": statistics.median(
                    ours / theirs for ours, theirs in zip(by_name["twinjet"], by_name["vllm"], strict=True)
                ),
                "rates": by_name,
            }
            for mode, by_name in found.items()
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=DEMO_MODEL, help="model folder; the demo model if absent")
    parser.add_argument("--dtype", help="of the model's arithmetic; absent: float32 for the demo model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", type=Path, help="also write the result here")
    args = parser.parse_args()
    result = asyncio.run(measure(args))
    prestart.stop()
    print(f"{args.streams} streams x {args.tokens} tokens, {args.rounds} rounds, {result['target']}")
    print(f"{'mode':<28}{'vLLM tok/s':>12}{'Twinjet tok/s':>15}{'ratio':>8}")
    for mode, row in result["modes"].items():
        print(
            f"{mode:<28}{row['vllm_tokens_per_s']:>12.0f}{row['twinjet_tokens_per_s']:>15.0f}"
            f"{row['ratio']:>8.2f}"
        )
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
