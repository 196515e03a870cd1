"""LLM and its loop, with the recorded behaviour of the PyTorch backend.

What is recorded and enforced here and in the modules beside: submission only inside a running loop; SamplingParams
changed by submission; one result object, changed in place, cumulative and shrinking when a stop is stripped; finish
reasons only when all outputs are final; a stop string ending all outputs; request errors raised from the step without
marking the result finished; logits processors on copies that went through pickle, called on the step's first rows,
shown one token too few while scheduling overlaps, called for each chunk of a prompt and once more after the end; what
a worker's death does to whoever meets it; single destructive iterators for statistics and KV events. Where versions
differ, the contract's behaviours say how.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tensorrt_llm import _contract, _guides
from tensorrt_llm import sampling_params as sampling
from tensorrt_llm._executor import Executor
from tensorrt_llm._iterations import EventLog, IterationResult, iteration_row, nothing
from tensorrt_llm._results import RequestOutput, Response
from tensorrt_llm._sampler import logprobs as _logprobs
from tensorrt_llm._sampler import prompt_logprobs as _prompt_logprobs
from tensorrt_llm._sampler import sample as _sample
from tensorrt_llm._toy import EOS, toy_logits, toy_tokenizer
from tensorrt_llm._transfer import Transceiver
from tensorrt_llm._transfer import refusal as _refusal
from tensorrt_llm.executor.utils import RequestError
from tensorrt_llm.llmapi import llm_args

_IS_13 = _contract.VERSION >= "1.3"
_HOST_BYTES_PER_TOKEN = 1024
_IDLE_STEP_S = 0.005
_CUDA_ERROR = "CUDA error: an illegal memory access was encountered"


@dataclass(eq=False)
class _Sequence:
    index: int
    processors: list[Any]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    reason: str | None = None
    called_after_end: bool = False
    guide: Any = None
    is_handed_on: bool = False
    """Its last token came with a handoff, so the next step knows it, overlap or not."""


@dataclass(eq=False)
class _Request:
    id: int
    prompt: list[int]
    text: str | None
    params: Any
    streaming: bool
    salt: str | None
    end_id: int
    is_cpp: bool
    priority: float
    rank: int | None
    retention: Any
    sequences: list[_Sequence] = field(default_factory=list)
    reasons: dict[int, str | None] = field(default_factory=dict)
    cached_tokens: int = 0
    trouble: tuple[str, int] | None = None
    prompt_logprobs: list[Any] | None = None
    guide_error: str | None = None
    result: Any = None
    has_prefilled: bool = False
    disaggregated: Any = None
    refusal: str | None = None

    @property
    def phase(self) -> str:
        return "context_and_generation" if self.disaggregated is None else self.disaggregated.request_type

    @property
    def open(self) -> list[_Sequence]:
        return [s for s in self.sequences if s.reason is None]


class LLM:
    """Runs the toy model. The folder given as model must exist."""

    is_prebuilt = False
    attention_windows: tuple[int, ...] = (4096,)
    """Windows of the model, for KV events; tests may change it before the first prompt."""
    num_dp_ranks = 1

    @_contract.recorded("LLM.__init__")
    def __init__(self, arguments: dict[str, Any]) -> None:
        model = arguments["model"]
        known = {entry["name"] for entry in _contract.class_fields("TorchLlmArgs")}
        unknown = sorted(set(arguments) - known)
        if unknown:
            raise ValueError(f"unknown arguments: {unknown}")
        if not Path(model).is_dir():
            raise FileNotFoundError(f"no model at {model}")
        self.args: Any = llm_args.TorchLlmArgs(**arguments)
        self.tokenizer = None if self.args.skip_tokenizer_init else _Wrapper(toy_tokenizer())
        self._executor: Executor | None = Executor(self)
        self._is_down = False
        self._ids = itertools.count(1)
        self._active: list[_Request] = []
        self._work: asyncio.Event | None = None
        self._task: asyncio.Task[None] | None = None
        self._stats: IterationResult | None = None
        self._events: IterationResult | None = None
        self._event_log: EventLog | None = None
        generation = Path(model) / "generation_config.json"
        self._generation_eos = _eos_ids(json.loads(generation.read_text())) if generation.is_file() else []
        self._prefixes: dict[Any, int] = {}
        self._is_crashed = False
        self._has_no_device = False
        self._num_steps = 0
        kv = self.args.kv_cache_config
        self._block_size = kv.tokens_per_block
        self._num_blocks = (kv.max_tokens or 65536) // self._block_size
        self.transceiver = Transceiver()
        self._num_host_blocks = (kv.host_cache_size or 0) // (self._block_size * _HOST_BYTES_PER_TOKEN)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def __reduce__(self) -> Any:
        raise RuntimeError("an LLM cannot be pickled")

    if _IS_13:

        def _check_health(self) -> bool:
            return not self._is_crashed and not self._is_down

        @_contract.recorded("LLM.get_kv_cache_capacity")
        def get_kv_cache_capacity(self, arguments: dict[str, Any]) -> dict[str, int]:
            return {
                "maxNumBlocks": self._num_blocks,
                "tokensPerBlock": self._block_size,
                "maxNumTokens": self._num_blocks * self._block_size,
            }

    @_contract.recorded("LLM.generate_async")
    def generate_async(self, arguments: dict[str, Any]) -> RequestOutput:
        asyncio.get_running_loop()
        if self._is_down:
            raise RuntimeError("LLM is shutting down")
        assert self._executor is not None
        self._executor.check_submission()
        params = arguments["sampling_params"] or sampling.SamplingParams()
        if arguments.get("priority") is not None and not 0 <= arguments["priority"] <= 1:
            raise ValueError(f"priority is {arguments['priority']}")
        prompt, text = self._tokenize(arguments["inputs"], params)
        if not self.args.enable_chunked_prefill and len(prompt) > (self.args.max_num_tokens or 8192):
            raise (RequestError if _IS_13 else ValueError)("the prompt is longer than max_num_tokens")
        disaggregated = arguments["disaggregated_params"]
        if disaggregated is not None and disaggregated.request_type == "context_only":
            params.max_tokens = 1
        sampling.setup(params, toy_tokenizer(), self.args.stream_interval, self._generation_eos)
        if params.guided_decoding is not None and self.args.guided_decoding_backend is None:
            params.guided_decoding = None
        request = _Request(
            id=next(self._ids),
            prompt=prompt,
            text=text,
            params=params,
            streaming=arguments["streaming"],
            salt=arguments.get("cache_salt"),
            end_id=-1 if params.ignore_eos else params.end_id,
            is_cpp=self.is_prebuilt or self.args.sampler_type == "TRTLLMSampler",
            priority=arguments.get("priority") or 0.5,
            rank=self._rank(arguments["scheduling_params"]),
            retention=arguments["kv_cache_retention_config"],
            disaggregated=disaggregated,
            refusal=None if disaggregated is None else _refusal(self.args, disaggregated),
        )
        request.sequences = [_Sequence(i, _shipped(params)) for i in range(params.best_of)]
        request.guide_error = self._begin_guides(request)
        request.trouble = _trouble_in(prompt)
        request.result = RequestOutput(self, request)
        self._begin()
        self._active.append(request)
        assert self._work is not None
        self._work.set()
        self._executor._handle_background_error()
        return request.result  # type: ignore[no-any-return]

    @_contract.recorded("LLM.get_stats_async")
    def get_stats_async(self, arguments: dict[str, Any]) -> Any:
        if self._stats is None:
            return nothing()
        self._stats.fetch(arguments["timeout"])
        return self._stats

    @_contract.recorded("LLM.get_kv_cache_events_async")
    def get_kv_cache_events_async(self, arguments: dict[str, Any]) -> Any:
        assert self._events is not None, "no prompt has been submitted"
        self._events.fetch(arguments["timeout"])
        return self._events

    @_contract.recorded("LLM.get_stats")
    def get_stats(self, arguments: dict[str, Any]) -> list[dict[str, Any]]:
        raise AssertionError("blocks; use get_stats_async in a loop")

    @_contract.recorded("LLM.get_kv_cache_events")
    def get_kv_cache_events(self, arguments: dict[str, Any]) -> list[dict[str, Any]]:
        raise AssertionError("blocks; use get_kv_cache_events_async in a loop")

    def shutdown(self) -> None:
        if self._is_down:
            return
        self._is_down = True
        if self._executor is not None:
            self._executor.shutdown()

    # ---- inside ----

    def _rank(self, params: Any) -> int | None:
        """Check where a request is to run: an engine without such a rank would not answer."""
        if params is None or params.attention_dp_rank is None:
            return None
        ranks = self.args.tensor_parallel_size if self.args.enable_attention_dp else 0
        assert 0 <= params.attention_dp_rank < ranks, "a request for this rank would wait for ever"
        assert params.attention_dp_relax is not None
        return int(params.attention_dp_rank)

    def _begin_guides(self, request: _Request) -> str | None:
        """Compile the guide; the text of its error is told with the first step."""
        if request.params.guided_decoding is None:
            return None
        try:
            for sequence in request.sequences:
                sequence.guide = _guides.matcher(request.params.guided_decoding)
        except (RuntimeError, ValueError, TypeError) as error:
            return f"Guided decoding error: {error}"
        return None

    def _tokenize(self, inputs: Any, params: Any) -> tuple[list[int], str | None]:
        if isinstance(inputs, dict) and "prompt_token_ids" in inputs:
            prompt, text = list(inputs["prompt_token_ids"]), None
        elif isinstance(inputs, list):
            prompt, text = list(inputs), None
        else:
            text = inputs if isinstance(inputs, str) else inputs["prompt"]
            prompt = toy_tokenizer().encode(text, add_special_tokens=params.add_special_tokens)
        assert isinstance(prompt[0], int)
        return prompt, text

    def _begin(self) -> None:
        if self._task is None:
            self._work = asyncio.Event()
            self._task = asyncio.create_task(self._run(), name="tensorrt_llm double")
        if self.args.enable_iter_perf_stats:
            self._stats = self._stats or IterationResult()
            self._stats.arm()
        if self._events is None:
            self._events = IterationResult()
            self._event_log = EventLog(self._put_event, list(self.attention_windows), self.num_dp_ranks)
            self._event_log.created(self._num_blocks, self._num_host_blocks)
        self._events.arm()

    def _stop_working(self) -> None:
        if self._task is not None:
            self._task.get_loop().call_soon_threadsafe(self._task.cancel)

    def _abort(self, request: _Request) -> None:
        if request in self._active and not self._is_crashed:
            self._active.remove(request)
            for sequence in request.open:
                sequence.reason = "CANCELLED"
                response = Response(sequence.index, [], [], "CANCELLED", True, request.cached_tokens)
                request.result._queue.put_nowait(response)

    async def _run(self) -> None:
        assert self._work is not None
        while not self._is_crashed:
            if not self._active:
                self._work.clear()
                await self._work.wait()
            has_worked = self._step()
            if has_worked:
                self._num_steps += 1
                self._put_stats()
            await asyncio.sleep(0 if has_worked else _IDLE_STEP_S)

    def _schedule(self) -> list[_Request]:
        """Choose the step's requests, prefills first."""
        waiting = [r for r in self._active if not r.has_prefilled]
        if (
            getattr(self.args.scheduler_config, "waiting_queue_policy", None)
            == llm_args.WaitingQueuePolicy["PRIORITY"]
        ):
            waiting.sort(key=lambda r: -r.priority)
        running = [r for r in self._active if r.has_prefilled]
        batch = [*running, *waiting][: self.args.max_batch_size]
        ready = [r for r in batch if r.trouble is None or not self._misbehave(r, *r.trouble)]
        for request in [r for r in ready if (r.guide_error or r.refusal) and r in self._active]:
            self._active.remove(request)
            request.result._queue.put_nowait(RequestError(request.guide_error or request.refusal))
        for request in [r for r in ready if r.phase == "generation_only" and not r.has_prefilled]:
            self._take_over(request)
        if self._has_no_device:
            for request in [r for r in self._active if r in ready]:
                self._active.remove(request)
                request.result._queue.put_nowait(RequestError(_CUDA_ERROR))
        if self._is_crashed:
            return []
        return sorted((r for r in ready if r in self._active), key=lambda r: r.has_prefilled)

    def _take_over(self, request: _Request) -> None:
        """Begin where another engine has computed the prompt; blocks that never come stop everything."""
        if request not in self._active:
            return
        try:
            has_come = Transceiver.fetch(request.disaggregated, request.prompt)
        except RequestError as error:
            self._active.remove(request)
            request.result._queue.put_nowait(error)
            return
        if not has_come:
            self.crash(None)
            return
        request.has_prefilled = True
        for token in request.disaggregated.first_gen_tokens:
            sequence = request.sequences[0]
            sequence.tokens.append(token)
            sequence.is_handed_on = True
            if sequence.guide is not None:
                sequence.guide.accept_token(token)
            request.result._queue.put_nowait(Response(0, [token], [], None, False, request.cached_tokens))

    def _step(self) -> bool:
        """Advance every scheduled request; say whether there was one."""
        batch = self._schedule()
        wants_all_rows = any(not r.has_prefilled and r.params.prompt_logprobs for r in batch)
        rows: list[torch.Tensor] = []
        owners: list[tuple[_Request, _Sequence, int]] = []
        num_counted = 0
        for request in batch:
            is_prefill = not request.has_prefilled
            if is_prefill:
                self._prefill(request)
            first = len(rows)
            if is_prefill and wants_all_rows:
                start = request.cached_tokens + 1
                rows += [toy_logits(request.prompt[:end]) for end in range(start, len(request.prompt))]
            rows += [toy_logits(request.prompt + s.tokens) for s in request.open]
            extra = len(rows) - first - len(request.open)
            at = first + extra
            if _contract.has("context_rows_miscounted"):
                counted = extra if request.params.prompt_logprobs else 0
                at = num_counted + counted
                num_counted += counted + len(request.open)
            owners += [(request, s, at + i) for i, s in enumerate(request.open)]
        raw = [row.clone() for row in rows]
        shifts = _contract.has("prompt_logprobs_shift_rows")
        for number, (request, sequence, at) in enumerate(owners):
            self._process(request, sequence, rows[number if shifts else at])
        for request, sequence, at in owners:
            self._advance(request, sequence, rows[at], raw[at])
        for request in batch:
            self._process_after_the_end(request)
            if not request.open and request in self._active:
                self._active.remove(request)
        return bool(batch)

    def _prefill(self, request: _Request) -> None:
        request.has_prefilled = True
        request.cached_tokens = self._match_prefix(request)
        if self.args.enable_chunked_prefill:
            self._process_early_chunks(request)

    def _process_after_the_end(self, request: _Request) -> None:
        for sequence in request.sequences:
            if sequence.reason is not None and not sequence.called_after_end and self._overlaps:
                # The step after the end was already under way; its token is thrown away.
                sequence.called_after_end = True
                self._process(request, sequence, toy_logits(request.prompt + sequence.tokens))

    def _process_early_chunks(self, request: _Request) -> None:
        """Call the processors as for a first token, which is thrown away, for each chunk but the last."""
        size = self.args.max_num_tokens or 8192
        for end in range(size, len(request.prompt), size):
            for sequence in request.sequences:
                self._process(request, sequence, toy_logits(request.prompt[:end]))

    @property
    def _overlaps(self) -> bool:
        return not self.args.disable_overlap_scheduler

    def _process(self, request: _Request, sequence: _Sequence, logits: torch.Tensor) -> None:
        lags = self._overlaps and not sequence.is_handed_on
        tokens = sequence.tokens[:-1] if lags else sequence.tokens
        for processor in sequence.processors:
            processor(request.id + 1000, logits, [request.prompt + tokens], None, None)

    def _advance(
        self, request: _Request, sequence: _Sequence, logits: torch.Tensor, raw: torch.Tensor
    ) -> None:
        params = request.params
        if sequence.guide is not None:
            _guides.mask(logits.reshape(-1), sequence.guide)
        sequence.is_handed_on = False
        token = _sample(logits.reshape(-1), request, sequence)
        if sequence.guide is not None and not sequence.guide.is_terminated():
            sequence.guide.accept_token(token)
        sequence.tokens.append(token)
        sequence.reason = self._stop_criteria(request, sequence, token)
        if params.logprobs:
            top_only = _contract.has("logprobs_top_only") and not request.is_cpp
            sequence.logprobs.append(_logprobs(raw, token, params.logprobs, top_only=top_only))
        if params.prompt_logprobs and len(sequence.tokens) == 1:
            request.prompt_logprobs = _prompt_logprobs(request, token)
        is_final = not request.open
        if request.phase == "context_only" and sequence.reason == "LENGTH":
            request.result._disaggregated_params = self.transceiver.hold(request.id, request.prompt, token)
            sequence.reason = "NOT_FINISHED" if _IS_13 else "LENGTH"
        if request.streaming or sequence.reason is not None:
            tokens = [token] if request.streaming else list(sequence.tokens)
            logprobs = sequence.logprobs[-1:] if request.streaming else list(sequence.logprobs)
            request.result._queue.put_nowait(
                Response(
                    sequence.index,
                    tokens,
                    logprobs,
                    sequence.reason,
                    is_final,
                    request.cached_tokens,
                    request.prompt_logprobs,
                )
            )

    def _stop_criteria(self, request: _Request, sequence: _Sequence, token: int) -> str | None:
        params = request.params
        if token == request.end_id:
            return "END_ID"
        room = (self.args.max_seq_len or 4096) - len(request.prompt)
        if len(sequence.tokens) >= min(params.max_tokens or room, room):
            return "LENGTH"
        for _, ids in sampling.stop_reasons(params):
            if (request.prompt + sequence.tokens)[-len(ids) :] == ids:
                return "STOP_WORDS"
        return None

    def _misbehave(self, request: _Request, kind: str, after: int) -> bool:
        if kind == "stall":
            return True
        if len(request.sequences[0].tokens) < after:
            return False
        if kind == "fail":
            self._active.remove(request)
            request.result._queue.put_nowait(RequestError("told to fail"))
        elif kind == "cuda":
            self._has_no_device = True
            return False
        elif kind in ("die", "lose"):
            assert self._executor is not None
            if kind == "lose":
                self._executor.workers_gone.clear()
            self.crash(RuntimeError("told to die"))
            # A response on its way is what lets one reader meet the error.
            index, cached = request.sequences[0].index, request.cached_tokens
            request.result._queue.put_nowait(Response(index, [], [], None, False, cached))
        else:
            self.crash(None)
        return True

    def crash(self, error: BaseException | None) -> None:
        """Stop as a crashed engine does. With no error nobody notices, not even 1.3."""
        self._is_crashed = error is not None or not _IS_13
        if error is not None and self._executor is not None:
            self._executor.worker_failed(error)
        if self._task is not None:
            self._task.cancel()

    def _match_prefix(self, request: _Request) -> int:
        if not self.args.kv_cache_config.enable_block_reuse:
            return 0
        salt = None if _contract.has("salt_ignored") else request.salt
        size, hits, parent, is_hit = self._block_size, 0, None, True
        for start in range(0, len(request.prompt) - size, size):
            block = tuple(request.prompt[start : start + size])
            key = (salt, parent, block)
            is_hit = is_hit and key in self._prefixes
            hits += size * is_hit
            if key not in self._prefixes:
                self._prefixes[key] = len(self._prefixes)
                assert self._event_log is not None
                rank = request.id if request.rank is None else request.rank
                self._event_log.stored(parent, key, block, rank, priority=_retained(request, start))
            parent = key
        return hits

    def _put_event(self, event: dict[str, Any]) -> None:
        if self.args.kv_cache_config.event_buffer_max_size and self._events is not None:
            self._events.put(event)

    def _put_stats(self) -> None:
        if self._stats is None:
            return
        used = sum(
            -(-(len(r.prompt) + len(s.tokens)) // self._block_size) for r in self._active for s in r.open
        )
        host = self._num_host_blocks if _contract.has("host_blocks_counted") else 0
        self._stats.put(
            iteration_row(
                step=self._num_steps,
                num_active=len(self._active),
                num_blocks=self._num_blocks + host,
                used=used,
                block_size=self._block_size,
            )
        )


class _Wrapper:
    """The package wraps the tokenizer; the wrapper lacks vocab_size."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @property
    def vocab_size(self) -> int:
        raise NotImplementedError

    @property
    def eos_token_id(self) -> int:
        return EOS


def _shipped(params: Any) -> list[Any]:
    """Copy the processors as the way to the worker process does."""
    processors = params.logits_processor
    if processors is None:
        return []
    if params.apply_batched_logits_processor:
        raise AssertionError("the batched hook is not called by this backend")
    listed = processors if isinstance(processors, list) else [processors]
    return [pickle.loads(pickle.dumps(processor)) for processor in listed]


def _trouble_in(prompt: list[int]) -> tuple[str, int] | None:
    text = bytes(t for t in prompt if t < 256).decode(errors="replace")
    found = re.search(r"!(fail|die|lose|cuda|stall|hang)(?::(\d+))?", text)
    return (found[1], int(found[2] or 0)) if found else None


def _eos_ids(generation: dict[str, Any]) -> list[int]:
    found = generation.get("eos_token_id", [])
    return [found] if isinstance(found, int) else list(found)


def _retained(request: _Request, start: int) -> int:
    """Give the priority of the block that begins at a prompt token."""
    for each in [] if request.retention is None else request.retention.token_range_retention_configs:
        if each.token_start <= start and (each.token_end is None or start < each.token_end):
            return int(each.priority)
    return 35
