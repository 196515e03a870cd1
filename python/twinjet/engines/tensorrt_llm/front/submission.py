"""What goes to the engine with a request besides its sampling: checks, and generate_async's keywords."""

from __future__ import annotations

from typing import Any

from twinjet.engines.tensorrt_llm.front.adapters import AdapterTable
from twinjet.engines.tensorrt_llm.front.describe import has_adapters
from twinjet.engines.tensorrt_llm.front.drawing import Drawing
from twinjet.engines.tensorrt_llm.front.features import field_names
from twinjet.engines.tensorrt_llm.front.handle import EngineHandle
from twinjet.engines.tensorrt_llm.front.handoff import FIELD, Handoff, Handoffs
from twinjet.engines.tensorrt_llm.front.params import engine_priority, retention_config
from twinjet.errors import InvalidRequest, Unsupported
from twinjet.request import EngineRequest

_DEFAULT_MAX_NUM_TOKENS = 8192


class Submission:
    """Checks requests before the engine sees them. adapters: the loaded ones."""

    def __init__(
        self, handle: EngineHandle, drawing: Drawing, adapters: AdapterTable, handoffs: Handoffs
    ) -> None:
        self._handoffs = handoffs
        self._handle = handle
        self._drawing = drawing
        self._adapters = adapters
        self._salt_epoch = 0

    def forget_prefixes(self) -> None:
        """Let no later request find what is cached now."""
        self._salt_epoch += 1

    def check_adapters(self) -> None:
        """Raise Unsupported if the engine was started without LoRA."""
        if not has_adapters(self._handle):
            raise Unsupported("adapters", "set enable_lora = true in the deployment's options")

    def check(self, request: EngineRequest) -> None:
        """Raise Unsupported, NotFound or InvalidRequest for what cannot be done here."""
        if request.adapter:
            self.check_adapters()
            self._adapters.check(request.adapter)
        if request.cache_salt and self._handle.has_block_reuse and not self._drawing.has_salt:
            raise Unsupported("prefix_cache", "this TensorRT-LLM has no cache salt or does not heed it")
        self._check_rank(request.data_parallel_rank)
        if request.kv_retention is not None and not self._handle.has_retention:
            raise Unsupported("kv_retention", "blocks are not reused, or this version knows no retention")
        if request.prefill_only and not self._handle.gives_handoffs:
            raise Unsupported(
                "prefill_only",
                "set cache_transceiver_config and, with TensorRT-LLM 1.2, disable_overlap_scheduler = true",
            )
        if request.handoff and not self._handle.takes_handoffs:
            raise Unsupported("handoff", "set cache_transceiver_config in the deployment's options")
        if request.handoff or self._handle.arg("enable_chunked_prefill", False):
            return
        most = self._handle.arg("max_num_tokens", None) or _DEFAULT_MAX_NUM_TOKENS
        if len(request.prompt_token_ids) > most:
            raise InvalidRequest.of(
                "prompt",
                f"{len(request.prompt_token_ids)} tokens; at most {most} are possible without chunked prefill",
            )

    def open_handoff(self, request: EngineRequest) -> Handoff | None:
        """Open what a checked request goes on from, once; None if it begins here. Raises InvalidRequest."""
        return self._handoffs.open(request) if request.handoff else None

    def keywords(self, request: EngineRequest, handoff: Handoff | None = None) -> dict[str, Any]:
        """Give generate_async's keywords for a request that was checked."""
        has, package = self._handle.features, self._handle.package
        keywords: dict[str, Any] = {"streaming": True}
        if request.adapter:
            keywords["lora_request"] = self._adapters.request(request.adapter, package.lora_request)
        if request.trace_headers and has.has_trace_headers:
            keywords["trace_headers"] = dict(request.trace_headers)
        if request.prefill_only:
            keywords["disaggregated_params"] = package.disaggregated_params(request_type="context_only")  # type: ignore[misc]
        elif handoff is not None:
            keywords["disaggregated_params"] = self._continuation(handoff)
        if request.data_parallel_rank is not None and package.scheduling_params is not None:
            keywords["scheduling_params"] = package.scheduling_params(
                attention_dp_rank=request.data_parallel_rank, attention_dp_relax=True
            )
        if request.kv_retention is not None:
            keywords["kv_cache_retention_config"] = retention_config(
                request.kv_retention, package.retention_config
            )
        if self._handle.queues_by_priority:
            keywords["priority"] = engine_priority(request.priority)
        if (salt := self._salt(request)) is not None and has.has_cache_salt:
            keywords["cache_salt"] = salt
        return keywords

    def _continuation(self, handoff: Handoff) -> Any:
        """Tell the engine where the blocks are. Raises InvalidRequest if it knows less than the one that has them."""
        params = self._handle.package.disaggregated_params
        if unknown := sorted(set(handoff.params) - field_names(params)):
            raise InvalidRequest.of(
                FIELD, f"is of a newer TensorRT-LLM: this one knows no {', '.join(unknown)}"
            )
        return params(request_type="generation_only", **handoff.params)  # type: ignore[misc]

    def _check_rank(self, rank: int | None) -> None:
        """A request for a rank that is not there would wait for ever."""
        if rank is None:
            return
        num_ranks = self._handle.num_dp_ranks
        if not num_ranks:
            raise Unsupported("data_parallel_rank", "the deployment has no attention data parallelism")
        if not 0 <= rank < num_ranks:
            raise InvalidRequest.of(
                "options.data_parallel_rank", f"{rank} is out of range; allowed: 0 to {num_ranks - 1}"
            )

    def _salt(self, request: EngineRequest) -> str | None:
        """Salt the prefix cache: the caller's, our epoch, and none shared where every logit is needed."""
        parts = []
        if self._salt_epoch:
            parts.append(f"epoch-{self._salt_epoch}")
        if request.sampling.prompt_logprobs is not None:
            parts.append(f"alone-{request.request_id}")
        if request.cache_salt:
            parts.append(f"salt-{request.cache_salt}")
        return "/".join(parts) or None
