"""Runs vLLM on shared-prefix prompts and writes what it generated and how it was scheduled.

For a process of its own: python offline_engine.py MODEL OUTPUT.json on|off sync|async, with
VLLM_ENABLE_V1_MULTIPROCESSING=0: processes that spin on shared memory starve each other on two cores.
"""

import json
import sys

from vllm import LLM, SamplingParams

from twinjet.engines.vllm.status import STATUS_METHOD

NUM_REQUESTS = 64
# Far fewer blocks than 64 requests take, so that requests wait, are preempted and lose cached blocks.
NUM_BLOCKS = 90


def prompts() -> list[list[int]]:
    """Four families of prompts; within one, the first 70 to 133 tokens are shared."""
    made = []
    for i in range(NUM_REQUESTS):
        family = i % 4
        prefix = [1000 + (family * 977 + j * 31) % 40000 for j in range(70 + 21 * family)]
        made.append(prefix + [500 + (i * 131 + j * 17) % 30000 for j in range(3 + i % 29)])
    return made


def main(model: str, output: str, native: str, scheduling: str) -> None:
    llm = LLM(
        model=model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        block_size=32,
        num_gpu_blocks_override=NUM_BLOCKS,
        max_num_seqs=NUM_REQUESTS,
        max_num_batched_tokens=1024,
        async_scheduling=scheduling == "async",
        distributed_executor_backend="uni",
        disable_log_stats=False,
        scheduler_cls="twinjet.engines.vllm.core.scheduler.make_scheduler",
        additional_config={"twinjet": {"native": native}},
    )
    params = [
        SamplingParams(temperature=0, max_tokens=8 + i % 17, ignore_eos=i % 3 == 0)
        for i in range(NUM_REQUESTS)
    ]
    done = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts()], params, use_tqdm=False)
    preemptions = sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")
    report = {
        "tokens": [list(request.outputs[0].token_ids) for request in done],
        "reasons": [request.outputs[0].finish_reason for request in done],
        "cached_tokens": [request.num_cached_tokens for request in done],
        "preemptions": preemptions,
        "async": llm.llm_engine.vllm_config.scheduler_config.async_scheduling,
        "status": getattr(llm.llm_engine.engine_core.engine_core, STATUS_METHOD)(),
    }
    with open(output, "w") as file:
        json.dump(report, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
