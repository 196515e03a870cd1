"""`twinjet serve` with the mock (mock_core.py) in place of vLLM's engine core; takes the arguments of serve.

vLLM is not imported anywhere: what its configuration would tell (Facts) is read from the model's folder, so a
start takes a second, and memory and CPU are the front end's alone.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path

import mock_core

from twinjet import cli
from twinjet.engines.base import LoadProgress
from twinjet.engines.vllm.facts import Facts
from twinjet.engines.vllm.front import prestart, startup
from twinjet.engines.vllm.front.core_link import CoreLink, Endpoints
from twinjet.engines.vllm.front.load import LoadReader
from twinjet.engines.vllm.front.process import EngineContext
from twinjet.models.tokenizer import HfTokenizer


def facts(plan: startup.Plan) -> Facts:
    """Give what vLLM would tell of a model in a folder."""
    config = json.loads((Path(plan.model) / "config.json").read_text(encoding="utf-8"))
    end = config["eos_token_id"]
    return Facts(
        version="0.32.0",
        device="cpu",
        source="a mock",
        tokenizer=plan.model,
        max_model_len=plan.options["max_model_len"],
        vocab_size=config["vocab_size"],
        max_logprobs=20,
        max_num_seqs=plan.options["max_num_seqs"],
        has_adapters=False,
        has_prefix_cache=False,
        has_priority=False,
        default_sampling={},
        eos=end,
        generation_eos=(end,),
        settings={},
        num_blocks=(1 << 22) - 1,
        block_size=32,
    )


async def launch(plan: startup.Plan, report: Callable[[LoadProgress], None]) -> startup.Running:
    """Start the mock as an engine's process; stands for startup.launch."""
    report(LoadProgress("starting the mock", 0.5))
    return await asyncio.to_thread(_launch, plan)


def _launch(plan: startup.Plan) -> startup.Running:
    endpoints = Endpoints()
    context = EngineContext(forked=False, phases=None)
    process = context.Process(
        target=mock_core.run,
        name="EngineCore",
        kwargs={
            "handshake_address": endpoints.address("handshake"),
            "max_model_len": plan.options["max_model_len"],
        },
    )
    process.start()
    told = facts(plan)
    tokenizer = HfTokenizer(told.tokenizer)
    endpoints.shake_hands(process)
    stats = LoadReader(told.num_blocks)
    link = CoreLink(endpoints, told, tokenizer, stats)
    return startup._Launcher(plan, forked=False)._running(link, context, told, tokenizer, stats)


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    startup.launch = launch
    prestart.prestart = lambda: None
    sys.exit(cli.main(["serve", *sys.argv[1:]]))
