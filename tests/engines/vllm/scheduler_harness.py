"""vLLM schedulers in process, with a runner that draws tokens by a hash instead of a model."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch
from zlib import crc32

import torch
from vllm.config import CacheConfig, LoRAConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RepetitionDetectionParams, SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

VOCAB_SIZE = 1000
EOS = 2


@dataclass(frozen=True)
class Setup:
    """What a pair of schedulers is built with."""

    is_async: bool = False
    num_blocks: int = 64
    block_size: int = 16
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 128
    max_model_len: int = 512
    prefix_caching: bool = True
    policy: str = "fcfs"
    long_prefill_token_threshold: int = 0
    watermark: float = 0.0
    num_clients: int = 1
    log_stats: bool = True
    max_loras: int = 0
    native: str = "on"
    is_v2: bool = False


_MODELS = TemporaryDirectory(prefix="twinjet-model-")


@cache
def _model_config(max_model_len: int) -> ModelConfig:
    directory = Path(_MODELS.name) / str(max_model_len)
    directory.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_hidden_layers": 2,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 1 << 20,
        "dtype": "float32",
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": EOS,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return ModelConfig(
        model=str(directory), skip_tokenizer_init=True, dtype="float32", max_model_len=max_model_len
    )


def vllm_config(setup: Setup) -> VllmConfig:
    config = VllmConfig(
        model_config=_model_config(setup.max_model_len),
        scheduler_config=SchedulerConfig(
            max_num_seqs=setup.max_num_seqs,
            max_num_batched_tokens=setup.max_num_batched_tokens,
            max_model_len=setup.max_model_len,
            enable_chunked_prefill=True,
            is_encoder_decoder=False,
            async_scheduling=setup.is_async,
            policy=setup.policy,
            long_prefill_token_threshold=setup.long_prefill_token_threshold,
            watermark=setup.watermark,
        ),
        cache_config=CacheConfig(block_size=setup.block_size, enable_prefix_caching=setup.prefix_caching),
        additional_config={"twinjet": {"native": setup.native}},
        lora_config=LoRAConfig(max_loras=setup.max_loras, max_lora_rank=8) if setup.max_loras else None,
    )
    config.cache_config.num_gpu_blocks = setup.num_blocks
    # This machine's executor may not do it; the schedulers do not ask.
    config.scheduler_config.async_scheduling = setup.is_async
    return config


def scheduler_arguments(setup: Setup) -> dict[str, Any]:
    config = vllm_config(setup)
    spec = FullAttentionSpec(block_size=setup.block_size, num_kv_heads=1, head_size=1, dtype=torch.float32)
    return {
        "vllm_config": config,
        "kv_cache_config": KVCacheConfig(
            num_blocks=setup.num_blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
        ),
        "structured_output_manager": StructuredOutputManager(config),
        "block_size": setup.block_size,
        "hash_block_size": setup.block_size,
        "include_finished_set": setup.num_clients > 1,
        "log_stats": setup.log_stats,
    }


def _runner(setup: Setup) -> Any:
    """Have vLLM's configuration name this runner; the V2 one is refused without Triton, which a scheduler has no use for."""
    return patch.object(VllmConfig, "use_v2_model_runner", setup.is_v2)


def make_stock(setup: Setup) -> Any:
    arguments = scheduler_arguments(setup)
    with _runner(setup):
        return (AsyncScheduler if setup.is_async else Scheduler)(**arguments)


def make_native(setup: Setup) -> Any:
    from twinjet.engines.vllm.core.scheduler import make_scheduler

    arguments = scheduler_arguments(setup)
    with _runner(setup):
        return make_scheduler(**arguments)


@cache
def stock_hasher(block_size: int) -> Any:
    hash_fn = get_hash_fn_by_name("sha256")
    init_none_hash(hash_fn)
    return get_request_block_hasher(block_size, hash_fn)


@dataclass(frozen=True)
class Prompt:
    """What both schedulers get their own Request of."""

    request_id: str
    tokens: tuple[int, ...]
    max_tokens: int
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    priority: int = 0
    client: int = 0
    cache_salt: str | None = None
    skip_reading_prefix_cache: bool | None = None
    repetition: bool = False
    adapter: int = 0
    trace: bool = False

    def request(self, hasher: Any, arrival_time: float) -> Request:
        params = SamplingParams(
            max_tokens=self.max_tokens,
            stop_token_ids=list(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
            skip_reading_prefix_cache=self.skip_reading_prefix_cache,
            repetition_detection=(
                RepetitionDetectionParams(max_pattern_size=2, min_pattern_size=1, min_count=3)
                if self.repetition
                else None
            ),
        )
        params.update_from_generation_config({}, EOS)
        return Request(
            request_id=self.request_id,
            prompt_token_ids=list(self.tokens),
            sampling_params=params,
            pooling_params=None,
            client_index=self.client,
            arrival_time=arrival_time,
            priority=self.priority,
            cache_salt=self.cache_salt,
            block_hasher=hasher,
            lora_request=LoRARequest(f"a{self.adapter}", self.adapter, "/none") if self.adapter else None,
            trace_headers={"traceparent": self.request_id} if self.trace else None,
        )


class Runner:
    """Stands in for the model: a token depends on the request and its position alone."""

    def __init__(self, vocab: int = 40) -> None:
        self.vocab = vocab
        self.num_tokens: dict[str, int] = {}
        self.tables: dict[str, list[int]] = {}
        self.scored: dict[str, bool] = {}

    def token(self, request_id: str, position: int) -> int:
        # Runs of equal tokens now and then, so that repetition detection has something to find.
        seed = crc32(f"{request_id.rpartition('#')[0]} {position // 4}".encode())
        return seed % self.vocab if seed % 5 == 0 else (seed + position * 7) % self.vocab

    def run(self, output: SchedulerOutput, wants_logprobs: set[str]) -> ModelRunnerOutput:
        computed: dict[str, int] = {}
        for request_id in output.finished_req_ids:
            self.num_tokens.pop(request_id, None)
            self.tables.pop(request_id, None)
        for new in output.scheduled_new_reqs:
            # For the V2 runner a resumed request is a new one that has output.
            self.num_tokens[new.req_id] = len(new.prefill_token_ids or new.prompt_token_ids)
            self.tables[new.req_id] = list(new.block_ids[0])
            computed[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            computed[request_id] = cached.num_computed_tokens[i]
            blocks = cached.new_block_ids[i]
            if request_id in cached.resumed_req_ids:
                self.tables[request_id] = list(blocks[0])
            elif blocks is not None:
                self.tables[request_id].extend(blocks[0])
            if request_id in cached.all_token_ids:
                self.num_tokens[request_id] = len(cached.all_token_ids[request_id])
        ids = list(output.num_scheduled_tokens)
        sampled: list[list[int]] = []
        for request_id in ids:
            end = computed[request_id] + output.num_scheduled_tokens[request_id]
            assert end <= len(self.tables[request_id]) * self.block_size
            if end < self.num_tokens[request_id]:
                sampled.append([])
                continue
            sampled.append([self.token(request_id, end)])
            self.num_tokens[request_id] = max(self.num_tokens[request_id], end + 1)
        logprobs = None
        if wants_logprobs & set(ids):
            import numpy as np

            columns = np.array([[row[0] if row else 0, 1] for row in sampled])
            logprobs = LogprobsLists(columns, -columns.astype(float), columns[:, 0], None)
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: i for i, request_id in enumerate(ids)},
            sampled_token_ids=sampled,
            logprobs=logprobs,
            num_nans_in_logits={},  # as the V1 runner, which counts none unless told to
        )

    block_size = 16


class Engine:
    """Drives one scheduler as vLLM's engine core does, with a batch queue when asynchronous."""

    def __init__(self, scheduler: Any, setup: Setup, hasher: Any) -> None:
        self.scheduler = scheduler
        self.setup = setup
        self.hasher = hasher if setup.prefix_caching else None
        self.runner = Runner()
        self.runner.block_size = setup.block_size
        self.queue: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self.wants_logprobs: set[str] = set()

    def add(self, prompt: Prompt, arrival_time: float) -> None:
        if prompt.logprobs is not None:
            self.wants_logprobs.add(prompt.request_id)
        self.scheduler.add_request(prompt.request(self.hasher, arrival_time))

    def abort(self, request_ids: list[str]) -> None:
        self.scheduler.finish_requests(request_ids, RequestStatus.FINISHED_ABORTED)

    def step(self) -> tuple[SchedulerOutput | None, dict[int, Any] | None]:
        """One call of the engine core's step function."""
        scheduler = self.scheduler
        output = None
        depth = 2 if self.setup.is_async else 1
        if scheduler.has_requests():
            output = scheduler.schedule()
            self.queue.appendleft((output, self.runner.run(output, self.wants_logprobs)))
            if len(self.queue) < depth and (output.total_num_scheduled_tokens or scheduler.has_requests()):
                return output, None
        elif not self.queue:
            return None, None
        past, result = self.queue.pop()
        return output, scheduler.update_from_output(past, result)


def make_engines(setup: Setup) -> tuple[Engine, Engine]:
    """A stock and a native engine of the same configuration."""
    stock = Engine(make_stock(setup), setup, stock_hasher(setup.block_size))
    native = make_native(setup)
    from vllm.v1.engine import core

    # As the engine core does after it made its scheduler.
    hasher = core.get_request_block_hasher(setup.block_size, get_hash_fn_by_name("sha256"))
    return stock, Engine(native, setup, hasher)
