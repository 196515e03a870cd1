"""One suite of the service for every engine: fake, TensorRT-LLM's stand-in in both versions, real vLLM.

Each engine serves from a process of its own; what a client sees must not tell them apart.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.engines.factories import DOUBLES, MODEL
from tests.server.harness import details, kinds, text_of
from tests.server.processes import server
from twinjet.v1 import admin_pb2, generation_pb2, model_pb2, sampling_pb2, service_pb2_grpc, tokenization_pb2

Request = generation_pb2.GenerateRequest
Sampling = sampling_pb2.SamplingParams

_TRT = f'engine = "tensorrt_llm"\nmodel = "{MODEL}"\noptions = {{ max_seq_len = 2048 }}\n'
SETTINGS = {
    "fake": 'engine = "fake"\noptions = { output = "logits", step_s = 0.002 }\n',
    "tensorrt_llm 1.2": _TRT,
    "tensorrt_llm 1.3": _TRT,
    "vllm": 'engine = "vllm"\nmodel = "demo"\n',
}


def _engine(name: str) -> Any:
    marks = [pytest.mark.engine, pytest.mark.timeout(600)] if name == "vllm" else []
    return pytest.param(name, marks=marks, id=name)


class Service:
    """A served engine, by its stubs."""

    def __init__(self, engine: str, channel: grpc.Channel) -> None:
        self.engine = engine
        self.inference = service_pb2_grpc.InferenceServiceStub(channel)
        self.models = service_pb2_grpc.ModelServiceStub(channel)
        self.admin = service_pb2_grpc.AdminServiceStub(channel)

    def model(self) -> model_pb2.Model:
        return self.models.GetModel(model_pb2.GetModelRequest()).model

    def has(self, capability: str) -> bool:
        return model_pb2.Capability.Value(f"CAPABILITY_{capability}") in self.model().capabilities

    def generate(
        self, text: str = "Once upon a time", **sampling: Any
    ) -> list[generation_pb2.GenerateResponse]:
        return list(self.inference.Generate(Request(text=text, sampling=Sampling(**sampling))))

    def until_idle(self) -> None:
        def busy() -> tuple[int, ...]:
            load = self.admin.GetLoad(admin_pb2.GetLoadRequest()).models[0]
            return load.waiting, load.running, load.engine_running, load.engine_waiting

        deadline = time.monotonic() + 20
        while any(busy()):
            assert time.monotonic() < deadline, busy()
            time.sleep(0.02)


@pytest.fixture(scope="module", params=[_engine(name) for name in SETTINGS])
def service(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, demo_model_path: Path
) -> Iterator[Service]:
    name: str = request.param
    environment: dict[str, str] = {}
    if name.startswith("tensorrt_llm"):
        path = [str(DOUBLES), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {"PYTHONPATH": os.pathsep.join(path), "TENSORRT_LLM_DOUBLE": name.split()[1]}
    settings = f"[deployments.model]\n{SETTINGS[name]}"
    with (
        server(tmp_path_factory.mktemp("server"), settings, environment=environment) as (_, address),
        grpc.insecure_channel(address) as channel,
    ):
        yield Service(name, channel)


def _refused(call: Callable[[], Any]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value  # type: ignore[return-value]


def test_it_is_ready_and_says_what_it_is(service: Service) -> None:
    model = service.model()
    assert model.state == model_pb2.MODEL_STATE_READY
    assert model.engine.name == service.engine.split()[0]
    assert model.limits.vocab_size > 256
    assert model.sampler.implementation == "twinjet", model.sampler


def test_events_come_in_order_and_counts_agree(service: Service) -> None:
    messages = service.generate(max_tokens=9, ignore_eos=True)
    events = kinds(messages)
    assert events[0] == "started"
    assert events[-2:] == ["finished", "summary"]
    assert set(events[1:-2]) == {"delta"}
    assert messages[-2].finished.reason == generation_pb2.FINISH_REASON_LENGTH
    streamed = sum(len(m.delta.token_ids) for m in messages)
    assert streamed == messages[-2].finished.output_tokens == messages[-1].summary.usage.output_tokens == 9
    assert messages[0].started.prompt_tokens == messages[-1].summary.usage.prompt_tokens


def test_the_seed_repeats_the_answer(service: Service) -> None:
    first = service.generate(max_tokens=12, temperature=1.0, ignore_eos=True)
    seed = first[-1].summary.seed
    again = service.generate(max_tokens=12, temperature=1.0, ignore_eos=True, seed=seed)
    assert text_of(again) == text_of(first)


def test_each_of_n_outputs_finishes_once(service: Service) -> None:
    messages = service.generate(max_tokens=8, n=3, temperature=1.0, ignore_eos=True, seed=1)
    finished = sorted(m.finished.output_index for m in messages if m.HasField("finished"))
    assert finished == [0, 1, 2]
    assert len({text_of(messages, i) for i in range(3)}) > 1


def test_a_stop_string_cuts_the_text_and_is_named(service: Service) -> None:
    whole = text_of(service.generate(max_tokens=24, temperature=0, ignore_eos=True))
    stop = whole[len(whole) // 2 :][:3]
    messages = service.generate(max_tokens=24, temperature=0, ignore_eos=True, stop=[stop])
    assert text_of(messages) == whole[: whole.index(stop)]
    assert messages[-2].finished.stop_string == stop


def test_logprobs_come_one_for_each_token(service: Service) -> None:
    messages = service.generate(max_tokens=5, temperature=0, logprobs=2, ignore_eos=True)
    for delta in (m.delta for m in messages if m.HasField("delta")):
        assert [entry.chosen.token_id for entry in delta.logprobs] == list(delta.token_ids)
        for entry in delta.logprobs:
            assert entry.chosen.logprob <= 0
            assert len(entry.top) == 2


def test_a_choice_is_kept_or_refused_by_name(service: Service) -> None:
    constraint = {"choice": {"values": ["yes", "no"]}}
    if service.has("CHOICE"):
        assert text_of(service.generate(max_tokens=16, constraint=constraint)) in ("yes", "no")
    else:
        error = _refused(lambda: service.generate(constraint=constraint))
        assert details(error)["ErrorInfo"].metadata["capability"] == "choice"


def test_a_chat_is_answered(service: Service) -> None:
    request = generation_pb2.ChatRequest(
        messages=[{"role": "user", "content": "Hello"}], sampling=Sampling(max_tokens=4, ignore_eos=True)
    )
    assert kinds(list(service.inference.Chat(request)))[-1] == "summary"


def test_tokens_and_text_are_each_others_inverse(service: Service) -> None:
    request = tokenization_pb2.TokenizeRequest(text="Hello there", add_special_tokens=False)
    ids = service.inference.Tokenize(request).token_ids
    assert (
        service.inference.Detokenize(tokenization_pb2.DetokenizeRequest(token_ids=ids)).text == "Hello there"
    )


def test_a_cancelled_stream_leaves_the_engine(service: Service) -> None:
    call = service.inference.Generate(Request(text="x", sampling=Sampling(max_tokens=1000, ignore_eos=True)))
    assert next(call).HasField("started")
    call.cancel()
    service.until_idle()


def test_a_passed_deadline_leaves_the_engine(service: Service) -> None:
    request = Request(text="x", sampling=Sampling(max_tokens=1500, ignore_eos=True))
    error = _refused(lambda: list(service.inference.Generate(request, timeout=0.1)))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    service.until_idle()


def test_an_aborted_stream_is_told_so(service: Service) -> None:
    sampling = Sampling(max_tokens=1500, ignore_eos=True)
    request = Request(text="x", sampling=sampling, options={"request_id": "abort-me"})
    call = service.inference.Generate(request)
    assert next(call).HasField("started")
    threading.Timer(0.05, lambda: service.admin.Abort(admin_pb2.AbortRequest(request_id="abort-me"))).start()
    error = _refused(lambda: list(call))
    assert error.code() is grpc.StatusCode.CANCELLED
    assert details(error)["ErrorInfo"].reason == "ABORTED"
    service.until_idle()


def test_mistakes_are_told_alike(service: Service) -> None:
    vocab_size = service.model().limits.vocab_size
    for request, field in [
        (Request(), "text"),
        (Request(text="x", token_ids=[1]), "text"),
        (Request(text="x", sampling=Sampling(temperature=math.nan)), "sampling.temperature"),
        (Request(text="x", sampling=Sampling(stop=["s"] * 10_000)), "sampling.stop"),
        (Request(text="x", sampling=Sampling(max_tokens=10**9)), "sampling.max_tokens"),
        (Request(token_ids=[vocab_size]), "token_ids"),
        (Request(token_ids=[1] * 100_000), "token_ids"),
    ]:
        error = _refused(lambda request=request: list(service.inference.Generate(request)))  # type: ignore[misc]
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert details(error)["BadRequest"].field_violations[0].field == field
    error = _refused(lambda: list(service.inference.Generate(Request(model="other", text="x"))))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    service.until_idle()
