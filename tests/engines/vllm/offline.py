"""Print vLLM's own offline greedy answers as JSON: model, options and prompts (token ids) come on stdin."""

import json
import os
import sys

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_PLUGINS"] = ""

from vllm import LLM, SamplingParams

wanted = json.load(sys.stdin)
llm = LLM(
    wanted["model"], enforce_eager=True, block_size=32, distributed_executor_backend="uni",
    kv_cache_memory_bytes=512 << 20, **wanted["options"],
)  # fmt: skip
answers = []
for prompt in wanted["prompts"]:
    params = SamplingParams(temperature=0, max_tokens=wanted["max_tokens"])
    (answer,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    answers.append(
        {
            "token_ids": list(answer.outputs[0].token_ids),
            "text": answer.outputs[0].text,
            "num_prompt_tokens": len(answer.prompt_token_ids),
            "finish_reason": answer.outputs[0].finish_reason,
        }
    )
print("ANSWERS " + json.dumps(answers), flush=True)
