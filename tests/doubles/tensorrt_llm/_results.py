"""What generate_async gives: one object, changed in place at each response."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from tensorrt_llm import _contract
from tensorrt_llm import sampling_params as sampling
from tensorrt_llm._toy import toy_tokenizer
from tensorrt_llm.executor.utils import RequestError

_IS_13 = _contract.VERSION >= "1.3"
CompletionFields = _contract.make_dataclass("CompletionOutput")


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
class Response:
    index: int
    tokens: list[int]
    logprobs: list[Any]
    reason: str | None
    is_final: bool
    cached_tokens: int
    prompt_logprobs: list[Any] | None = None


class RequestOutput:
    """The same object is yielded at each step."""

    def __init__(self, llm: Any, request: Any) -> None:
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
        self._disaggregated_params = request.disaggregated
        self.mm_embedding_handle = None
        if _IS_13:
            self.error: str | None = None

    @property
    def request_id(self) -> int:
        return int(self._request.id)

    @property
    def id(self) -> int:
        return int(self._request.id)

    @property
    def disaggregated_params(self) -> Any:
        """What the request came with, until the engine says something else."""
        return self._disaggregated_params

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
        try:
            self._llm._executor._handle_background_error()
        except BaseException:
            self._is_broken = True
            raise
        self._handle(response)

    def _handle(self, response: Response) -> None:
        params = self.sampling_params
        self._done = response.is_final
        self.cached_tokens = response.cached_tokens
        self.decoding_iter += 1
        output = self._outputs[response.index]
        output._last_tokens = len(output.token_ids)
        output.token_ids.extend(response.tokens)
        output.logprobs.extend(response.logprobs)
        output.disaggregated_params = self._disaggregated_params
        is_handed_on = self._request.phase == "generation_only"
        if is_handed_on and params.logprobs and _contract.has("handoff_loses_first_logprob"):
            assert len(output.logprobs) == len(output.token_ids), "logprobs length"
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
            "NOT_FINISHED": "not_finished",
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
