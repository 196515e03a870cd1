"""LLM, its results and its loop, with the recorded behaviour of the PyTorch backend.

What is recorded and enforced: submission only inside a running loop; SamplingParams changed by submission; one
result object, changed in place, cumulative and shrinking when a stop is stripped; finish reasons only when
all outputs are final; a stop string ending all outputs; request errors raised from the step without marking
the result finished; logits processors on copies that went through pickle, shown one token too few while
scheduling overlaps, called for each chunk of a prompt and once more after the end; fatal errors at one result only, with an engine that
looks healthy in 1.2; single destructive iterators for statistics and KV events.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import pickle
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tensorrt_llm import _contract
from tensorrt_llm import sampling_params as sampling
from tensorrt_llm._toy import EOS, VOCAB_SIZE, toy_logits, toy_tokenizer
from tensorrt_llm.executor.executor import CppExecutorError
from tensorrt_llm.executor.utils import RequestError
from tensorrt_llm.llmapi import llm_args

_IS_13 = _contract.VERSION >= "1.3"
CompletionFields = _contract.make_dataclass("CompletionOutput")
Logprob = _contract.make_dataclass("Logprob")


class CompletionOutput(CompletionFields):  # type: ignore[misc, valid-type]
    """One output; the diffs are relative to this output's own last response."""

    _last_text = 0
    _last_tokens = 0

    @property
    def length(self) -> int:
        return len(self.token_ids)

    @property
    def text_diff(self) -> str:
        return str(self.text[self._last_text :])

    @property
    def token_ids_diff(self) -> list[int]:
        return list(self.token_ids[self._last_tokens :])


@dataclass
class _Response:
    index: int
    tokens: list[int]
    logprobs: list[Any]
    reason: str | None
    is_final: bool
    cached_tokens: int
    prompt_logprobs: list[Any] | None = None


class RequestOutput:
    """What generate_async returns; the same object is yielded at each step."""

    def __init__(self, llm: Any, request: _Request) -> None:
        self._llm = llm
        self._request = request
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self._outputs = [CompletionOutput(index=i) for i in range(request.params.best_of)]
        self._done = False
        self._aborted = False
        self._is_broken = False
        self.prompt = request.text
        self.prompt_token_ids = list(request.prompt)
        self.sampling_params = request.params
        self.cached_tokens = 0
        self.decoding_iter = 0
        self.context_logits = None
        self.avg_decoded_tokens_per_iter = None
        self.metrics_dict: dict[str, float] = {}
        self.disaggregated_params = None
        self.mm_embedding_handle = None
        if _IS_13:
            self.error: str | None = None

    @property
    def request_id(self) -> int:
        return self._request.id

    @property
    def id(self) -> int:
        return self._request.id

    @property
    def finished(self) -> bool:
        return self._done

    @property
    def outputs(self) -> list[Any]:
        return self._outputs[: self.sampling_params.n]

    def abort(self) -> None:
        if self._llm._executor is None:
            raise AssertionError("the executor is not set for this result")
        self._llm._abort(self._request)
        self._aborted = True

    def aborted(self) -> bool:
        return self._aborted

    def result(self, timeout: float | None = None) -> Any:
        raise AssertionError("result() would block the loop")

    async def aresult(self) -> RequestOutput:
        while not self._done:
            await self._step()
        return self

    def __await__(self) -> Any:
        return self.aresult().__await__()

    def __aiter__(self) -> RequestOutput:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._done:
            raise StopAsyncIteration
        await self._step()
        return self

    async def _step(self) -> None:
        if self._is_broken:
            raise AssertionError("stepped again after an exception: this would hang")
        response = await self._queue.get()
        if isinstance(response, Exception):
            self._is_broken = True
            if _IS_13 and isinstance(response, RequestError):
                self.error = str(response)
            raise response
        self._handle(response)

    def _handle(self, response: _Response) -> None:
        params = self.sampling_params
        self._done = response.is_final
        self.cached_tokens = response.cached_tokens
        self.decoding_iter += 1
        output = self._outputs[response.index]
        output._last_tokens = len(output.token_ids)
        output.token_ids.extend(response.tokens)
        output.logprobs.extend(response.logprobs)
        if response.prompt_logprobs is not None:
            output.prompt_logprobs = response.prompt_logprobs
        self._request.reasons[response.index] = response.reason
        if response.reason == "CANCELLED":
            output.finish_reason = "cancelled"
        if self._done:
            self._finish(output, response.reason)
        if params.detokenize:
            for each in self.outputs:
                self._detokenize(each)

    def _finish(self, output: Any, reason: str | None) -> None:
        output.finish_reason = {
            "END_ID": "stop",
            "STOP_WORDS": "stop",
            "LENGTH": "length",
            "TIMED_OUT": "timeout",
            "CANCELLED": "cancelled",
        }.get(reason or "", output.finish_reason)
        if reason != "STOP_WORDS":
            return
        for stop_reason, ids in sampling.stop_reasons(self.sampling_params):
            if output.token_ids[-len(ids) :] == ids:
                output.stop_reason = stop_reason
                if not self.sampling_params.include_stop_str_in_output:
                    output.token_ids = output.token_ids[: -len(ids)]
                break

    def _detokenize(self, output: Any) -> None:
        params = self.sampling_params
        output._last_text = len(output.text)
        output.text = toy_tokenizer().decode(output.token_ids, skip_special_tokens=params.skip_special_tokens)
        for stop_reason, _ in sampling.stop_reasons(params):
            if isinstance(stop_reason, str) and stop_reason in output.text:
                end = output.text.find(stop_reason)
                end += len(stop_reason) if params.include_stop_str_in_output else 0
                output.text = output.text[:end]
                output.finish_reason, output.stop_reason = "stop", stop_reason
                self.abort()
                self._done = True
                return


@dataclass(eq=False)
class _Sequence:
    index: int
    processors: list[Any]
    tokens: list[int] = field(default_factory=list)
    reason: str | None = None
    called_after_end: bool = False


@dataclass(eq=False)
class _Request:
    id: int
    prompt: list[int]
    text: str | None
    params: Any
    streaming: bool
    salt: str | None
    end_id: int
    sequences: list[_Sequence] = field(default_factory=list)
    reasons: dict[int, str | None] = field(default_factory=dict)
    cached_tokens: int = 0
    trouble: tuple[str, int] | None = None
    result: Any = None
    has_prefilled: bool = False

    @property
    def open(self) -> list[_Sequence]:
        return [s for s in self.sequences if s.reason is None]


class _Executor:
    """The recorded private face: is_shutdown() says nothing of a crash in 1.2."""

    def __init__(self) -> None:
        self._is_shutdown = False
        if _IS_13:
            self._fatal_error: BaseException | None = None

    def is_shutdown(self) -> bool:
        return self._is_shutdown


class _IterationResult:
    """The single iterator of statistics or events: one consumer, destructive, ends after a silence."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.timeout: float | None = 2
        self._is_armed = True
        self._has_consumer = False

    def arm(self) -> None:
        self._is_armed = True

    def __aiter__(self) -> _IterationResult:
        if self._has_consumer:
            raise AssertionError("a second consumer would steal elements")
        self._has_consumer = True
        return self

    async def __anext__(self) -> dict[str, Any]:
        if not self._is_armed:
            self._has_consumer = False
            raise StopAsyncIteration
        try:
            return await asyncio.wait_for(self.queue.get(), self.timeout)
        except TimeoutError:
            self._is_armed = self._has_consumer = False
            raise StopAsyncIteration from None
        except asyncio.CancelledError:
            self._has_consumer = False
            raise


async def _nothing() -> AsyncIterator[dict[str, Any]]:
    for _ in ():
        yield {}


class LLM:
    """Runs the toy model. The folder given as model must exist."""

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
        self._executor: _Executor | None = _Executor()
        self._is_down = False
        self._ids = itertools.count(1)
        self._active: list[_Request] = []
        self._work: asyncio.Event | None = None
        self._task: asyncio.Task[None] | None = None
        self._stats: _IterationResult | None = None
        self._events: _IterationResult | None = None
        self._event_ids = itertools.count()
        self._prefixes: dict[Any, int] = {}
        self._is_crashed = False
        self._num_steps = 0
        kv = self.args.kv_cache_config
        self._block_size = kv.tokens_per_block
        self._num_blocks = (kv.max_tokens or 65536) // self._block_size

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def __reduce__(self) -> Any:
        raise RuntimeError("an LLM cannot be pickled")

    if _IS_13:

        def _check_health(self) -> bool:
            return not self._is_crashed and not self._is_down

    @_contract.recorded("LLM.generate_async")
    def generate_async(self, arguments: dict[str, Any]) -> RequestOutput:
        asyncio.get_running_loop()
        if self._is_down:
            raise RuntimeError("LLM is shutting down")
        params = arguments["sampling_params"] or sampling.SamplingParams()
        if arguments.get("priority") is not None and not 0 <= arguments["priority"] <= 1:
            raise ValueError(f"priority is {arguments['priority']}")
        prompt, text = self._tokenize(arguments["inputs"], params)
        if not self.args.enable_chunked_prefill and len(prompt) > (self.args.max_num_tokens or 8192):
            raise (RequestError if _IS_13 else ValueError)("the prompt is longer than max_num_tokens")
        sampling.setup(params, toy_tokenizer(), self.args.stream_interval)
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
        )
        request.sequences = [_Sequence(i, _shipped(params)) for i in range(params.best_of)]
        request.trouble = _trouble_in(prompt)
        request.result = RequestOutput(self, request)
        self._begin()
        self._active.append(request)
        assert self._work is not None
        self._work.set()
        return request.result  # type: ignore[no-any-return]

    @_contract.recorded("LLM.get_stats_async")
    def get_stats_async(self, arguments: dict[str, Any]) -> Any:
        if self._stats is None:
            return _nothing()
        self._stats.timeout = arguments["timeout"]
        return self._stats

    @_contract.recorded("LLM.get_kv_cache_events_async")
    def get_kv_cache_events_async(self, arguments: dict[str, Any]) -> Any:
        assert self._events is not None, "no prompt has been submitted"
        self._events.timeout = arguments["timeout"]
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
            self._executor._is_shutdown = True
        if self._task is not None:
            self._task.get_loop().call_soon_threadsafe(self._task.cancel)

    # ---- inside ----

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
            self._stats = self._stats or _IterationResult()
            self._stats.arm()
        self._events = self._events or _IterationResult()
        self._events.arm()

    def _abort(self, request: _Request) -> None:
        if request in self._active and not self._is_crashed:
            self._active.remove(request)
            for sequence in request.open:
                sequence.reason = "CANCELLED"
                response = _Response(sequence.index, [], [], "CANCELLED", True, request.cached_tokens)
                request.result._queue.put_nowait(response)

    async def _run(self) -> None:
        assert self._work is not None
        while not self._is_crashed:
            if not self._active:
                self._work.clear()
                await self._work.wait()
            for request in list(self._active)[: self.args.max_batch_size]:
                if request in self._active and not self._is_crashed:
                    self._step_request(request)
            self._num_steps += 1
            self._put_stats()
            await asyncio.sleep(0)

    def _step_request(self, request: _Request) -> None:
        if request.trouble is not None and self._misbehave(request, *request.trouble):
            return
        if not request.has_prefilled:
            request.has_prefilled = True
            request.cached_tokens = self._match_prefix(request)
            if self.args.enable_chunked_prefill:
                self._process_early_chunks(request)
        for sequence in list(request.open):
            self._step_sequence(request, sequence)
        for sequence in request.sequences:
            if sequence.reason is not None and not sequence.called_after_end and self._overlaps:
                # The step after the end was already under way; its token is thrown away.
                sequence.called_after_end = True
                self._process(request, sequence, toy_logits(request.prompt + sequence.tokens))
        if not request.open:
            self._active.remove(request)

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
        tokens = sequence.tokens[:-1] if self._overlaps else sequence.tokens
        for processor in sequence.processors:
            processor(request.id + 1000, logits, [request.prompt + tokens], None, None)

    def _step_sequence(self, request: _Request, sequence: _Sequence) -> None:
        params = request.params
        raw = toy_logits(request.prompt + sequence.tokens)
        logits = raw.clone()
        self._process(request, sequence, logits)
        token = _sample(logits.reshape(-1), params, len(sequence.tokens), sequence.index)
        sequence.tokens.append(token)
        sequence.reason = self._stop_criteria(request, sequence, token)
        logprobs = [_logprobs(raw, token, params.logprobs)] if params.logprobs else []
        prompt_logprobs = None
        if params.prompt_logprobs and len(sequence.tokens) == 1:
            # Tokens whose blocks were found in the cache went through no forward pass: no logits.
            first = max(1, request.cached_tokens + 1)
            prompt_logprobs = [
                _logprobs(toy_logits(request.prompt[:i]), request.prompt[i], params.prompt_logprobs)
                for i in range(first, len(request.prompt))
            ]
        is_final = not request.open
        if request.streaming or sequence.reason is not None:
            tokens = [token] if request.streaming else list(sequence.tokens)
            request.result._queue.put_nowait(
                _Response(
                    sequence.index,
                    tokens,
                    logprobs,
                    sequence.reason,
                    is_final,
                    request.cached_tokens,
                    prompt_logprobs,
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
        elif kind == "die":
            error = CppExecutorError("told to die")
            request.result._queue.put_nowait(error)
            self.crash(error)
        else:
            self.crash(None)
        return True

    def crash(self, error: BaseException | None) -> None:
        """Stop as a crashed engine does: whoever waits goes on waiting. With no error even 1.3 does not notice."""
        self._is_crashed = error is not None or not _IS_13
        if _IS_13 and error is not None and self._executor is not None:
            self._executor._fatal_error = error
        if self._task is not None:
            self._task.cancel()

    def _match_prefix(self, request: _Request) -> int:
        if not self.args.kv_cache_config.enable_block_reuse:
            return 0
        size, hits, parent, is_hit = self._block_size, 0, None, True
        for start in range(0, len(request.prompt) - size, size):
            block = tuple(request.prompt[start : start + size])
            key = (request.salt, parent, block)
            is_hit = is_hit and key in self._prefixes
            hits += size * is_hit
            if key not in self._prefixes:
                self._prefixes[key] = hash(key)
                self._put_event(None if parent is None else hash(parent), hash(key), block)
            parent = key
        return hits

    def _put_event(self, parent: int | None, block_hash: int, tokens: tuple[int, ...]) -> None:
        if not self.args.kv_cache_config.event_buffer_max_size or self._events is None:
            return
        block = {
            "type": "stored_block",
            "block_hash": block_hash,
            "tokens": [{"type": "unique_token", "token_id": t, "token_extra_id": 0} for t in tokens],
            "cache_level": 0,
            "priority": 35,
        }
        self._events.queue.put_nowait(
            {
                "event_id": next(self._event_ids),
                "data": {"type": "stored", "parent_hash": parent, "blocks": [block]},
                "window_size": 4096,
            }
        )

    def _put_stats(self) -> None:
        if self._stats is None:
            return
        used = sum(
            -(-(len(r.prompt) + len(s.tokens)) // self._block_size) for r in self._active for s in r.open
        )
        row = dict.fromkeys(_contract.CONTRACT["stats"]["iteration"])
        kv = dict.fromkeys(_contract.CONTRACT["stats"]["kvCacheStats"], 0)
        batching = dict.fromkeys(_contract.CONTRACT["stats"]["inflightBatchingStats"], 0)
        kv |= {
            "maxNumBlocks": self._num_blocks,
            "usedNumBlocks": used,
            "freeNumBlocks": self._num_blocks - used,
            "tokensPerBlock": self._block_size,
        }
        row |= {
            "iter": self._num_steps,
            "numActiveRequests": len(self._active),
            "numQueuedRequests": 0,
            "kvCacheStats": kv,
            "inflightBatchingStats": batching,
        }
        self._stats.queue.put_nowait(row)


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
    found = re.search(r"!(fail|die|stall|hang)(?::(\d+))?", text)
    return (found[1], int(found[2] or 0)) if found else None


def _sample(logits: torch.Tensor, params: Any, position: int, index: int) -> int:
    if params.embedding_bias is not None:
        logits = logits + torch.as_tensor(params.embedding_bias)
    if params.min_tokens and position < params.min_tokens:
        logits[EOS] = -math.inf
    for word in params._bad_word_ids or []:
        if len(word) == 1:
            logits[word[0]] = -math.inf
    if params._greedy_decoding:
        return int(logits.argmax())
    temperature = 1.0 if params.temperature is None else params.temperature
    probs = torch.softmax(logits / temperature, dim=-1)
    if params.top_k:
        floor = probs.topk(min(params.top_k, VOCAB_SIZE)).values[-1]
        probs = torch.where(probs >= floor, probs, 0)
    generator = torch.Generator().manual_seed(
        ((params.seed or 0) * 1_000_003 + position * 64 + index) % 2**63
    )
    return int(torch.multinomial(probs, 1, generator=generator))


def _logprobs(logits: torch.Tensor, token: int, num: int) -> dict[int, Any]:
    values = torch.log_softmax(logits.reshape(-1), dim=-1)
    best = torch.topk(values, num).indices.tolist()
    ranks = {t: rank for rank, t in enumerate(best, start=1)}
    rank = ranks.get(token, int((values >= values[token]).sum()))
    return {t: Logprob(logprob=float(values[t]), rank=ranks.get(t, rank)) for t in [token, *best]}
