"""One streamed request against a running service, and what became of it; for the benchmarks beside it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import grpc
from google.rpc import error_details_pb2, status_pb2

from twinjet.v1 import generation_pb2, sampling_pb2, service_pb2_grpc

DETAILS = "grpc-status-details-bin"


@dataclass
class Outcome:
    """code: status name. ttft_s, total_s: from sending. retry_after_s: of RetryInfo, None if there was none.

    complete: status OK and a summary came, so nothing of the stream was lost.
    """

    tenant: str
    sent_at: float
    code: str = "UNKNOWN"
    ttft_s: float | None = None
    total_s: float = 0.0
    tokens: int = 0
    complete: bool = False
    retry_after_s: float | None = None
    engine_queue_s: float | None = None


def retry_after_s(error: grpc.aio.AioRpcError) -> float | None:
    for key, value in error.trailing_metadata() or ():
        if key != DETAILS:
            continue
        for detail in status_pb2.Status.FromString(value).details:
            info = error_details_pb2.RetryInfo()
            if detail.Unpack(info):
                return info.retry_delay.ToTimedelta().total_seconds()
    return None


async def send(
    stub: service_pb2_grpc.InferenceServiceStub,
    *,
    model: str,
    prompt: list[int],
    max_tokens: int,
    tenant: str,
    timeout_s: float | None = None,
) -> Outcome:
    """Send one request and read its stream to the end."""
    request = generation_pb2.GenerateRequest(
        model=model,
        token_ids=prompt,
        sampling=sampling_pb2.SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0.0),
        options=generation_pb2.RequestOptions(tenant=tenant),
    )
    start = time.perf_counter()
    outcome = Outcome(tenant, start)
    try:
        async for response in stub.Generate(request, timeout=timeout_s):
            kind = response.WhichOneof("event")
            if kind == "delta":
                if outcome.ttft_s is None and response.delta.token_ids:
                    outcome.ttft_s = time.perf_counter() - start
                outcome.tokens += len(response.delta.token_ids)
            elif kind == "summary":
                outcome.complete = True
                outcome.engine_queue_s = response.summary.timings.queue.ToTimedelta().total_seconds()
        outcome.code = "OK"
    except grpc.aio.AioRpcError as error:
        outcome.code = error.code().name
        outcome.retry_after_s = retry_after_s(error)
    outcome.total_s = time.perf_counter() - start
    return outcome


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]
