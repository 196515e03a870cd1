"""Our messages against vLLM's own: what it would have sent for a request, and what it sends for a step."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from twinjet import _core
from twinjet.engines.vllm.front import wire
from twinjet.engines.vllm.front.link import Adapter
from twinjet.engines.vllm.front.params import sampling_fields
from twinjet.errors import InvalidRequest
from twinjet.grammar.room import CompiledGrammar
from twinjet.grammar.vocabulary import Vocabulary as GrammarVocabulary
from twinjet.models.tokenizer import HfTokenizer
from twinjet.request import Constraint, Sampling

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("default")]

GRAMMAR = CompiledGrammar("", GrammarVocabulary("/vocabulary", "key", (2,)), 0)
VOCAB = 49152


def samplings() -> st.SearchStrategy[Sampling]:
    unit = st.floats(0, 1, allow_subnormal=False)
    token = st.integers(0, VOCAB - 1)
    return st.builds(
        Sampling,
        temperature=st.sampled_from([0.0, 1e-6, 0.001, 0.7, 2.0]),
        top_p=st.floats(0.01, 1), top_k=st.integers(0, 200), min_p=unit,
        repetition_penalty=st.floats(0.1, 2), frequency_penalty=st.floats(-2, 2),
        presence_penalty=st.floats(-2, 2),
        logit_bias=st.dictionaries(token, st.floats(-100, 100), max_size=3),
        seed=st.integers(0, 2**64 - 1), n=st.just(1),
        max_tokens=st.integers(10, 500), min_tokens=st.integers(0, 10),
        stop=st.lists(st.text(min_size=1, max_size=5), max_size=2).map(tuple),
        stop_token_ids=st.lists(token, max_size=3).map(tuple),
        include_stop=st.booleans(), ignore_eos=st.booleans(),
        bad_words=st.just(()),
        allowed_token_ids=st.lists(token, max_size=3, unique=True).map(tuple),
        logprobs=st.none() | st.integers(0, 5), prompt_logprobs=st.none() | st.integers(0, 5),
        skip_special_tokens=st.booleans(),
        constraint=st.none() | st.sampled_from(
            [Constraint("regex", "[ab]+"), Constraint("json_object"), Constraint("choice", choices=("a", "b"))]
        ),
    )  # fmt: skip


@dataclasses.dataclass
class Stock:
    """AsyncLLM's input processing, and the facts of the same configuration."""

    processor: Any
    facts: Any
    tokenizer: HfTokenizer

    def encoded(self, sampling: Sampling, index: int, *, native: bool, lora: Any, **keywords: Any) -> Any:
        """Give the EngineCoreRequest that AsyncLLM would send."""
        from vllm.v1.serial_utils import MsgpackEncoder

        from twinjet.engines.vllm.front.params import sampling_params

        prompt = {"type": "token", "prompt_token_ids": [1, 2, 3], "cache_salt": keywords.pop("salt")}
        if not prompt["cache_salt"]:
            del prompt["cache_salt"]
        request = self.processor.process_inputs(
            "r-1f", prompt, sampling_params(sampling, index, native=native, grammar=GRAMMAR), ("generate",),
            arrival_time=1.0, **keywords,
        )  # fmt: skip
        request.lora_request = lora
        request.external_req_id = "r"
        return b"".join(MsgpackEncoder().encode(request))


@pytest.fixture(scope="module")
def stock(demo_model_path: Path) -> Stock:
    from vllm.v1.engine.input_processor import InputProcessor

    from twinjet.engines.vllm import config as config_module

    config = config_module.engine_config(
        str(demo_model_path), {"max_model_len": 2048}, scheduler_cls=None, worker_cls=None
    )
    facts = dataclasses.replace(config_module.facts(config), generation_eos=(0, 2, 5))
    processor = InputProcessor(config)
    processor.generation_config_fields = {"eos_token_id": [0, 2, 5]}
    return Stock(processor, facts, HfTokenizer(demo_model_path))


def decoded(message: bytes) -> dict[str, Any]:
    """Decode as the engine core does; gives its parts with all their fields."""
    import msgspec
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.serial_utils import MsgpackDecoder

    request = MsgpackDecoder(EngineCoreRequest).decode(message)
    fields = msgspec.structs.asdict(request)
    params = msgspec.structs.asdict(fields.pop("sampling_params"))
    params["stop_token_ids"] = set(params["stop_token_ids"])
    lora = fields.pop("lora_request")
    fields.pop("arrival_time")
    return {"fields": fields, "params": params, "lora": lora and msgspec.structs.asdict(lora)}


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sampling=samplings(), index=st.integers(0, 2), native=st.booleans(), salt=st.sampled_from(["", "s"]),
    priority=st.integers(-100, 100), has_lora=st.booleans(),
)  # fmt: skip
def test_a_request_is_what_async_llm_would_send(
    stock: Stock, sampling: Sampling, index: int, native: bool, salt: str, priority: int, has_lora: bool
) -> None:
    from vllm.lora.request import LoRARequest

    theirs = decoded(
        stock.encoded(
            sampling, index, native=native, salt=salt, priority=priority,
            lora=LoRARequest("a", 7, "/p") if has_lora else None,
        )
    )  # fmt: skip
    fields = sampling_fields(sampling, index, native=native, grammar=GRAMMAR)
    params = wire.core_params(fields, stock.facts, native=native)
    ours = decoded(
        wire.add_request(
            "r-1f", "r", (1, 2, 3), params, adapter=Adapter("a", 7, "/p") if has_lora else None,
            cache_salt=salt, priority=priority,
        )
    )  # fmt: skip
    assert ours == theirs


def test_min_tokens_above_a_default_max_tokens_is_refused(stock: Stock) -> None:
    from tests.engines.vllm.support import GREEDY

    wrong = dataclasses.replace(GREEDY, max_tokens=3, min_tokens=4)
    with pytest.raises(InvalidRequest, match=r"sampling\.min_tokens"):
        wire.core_params(sampling_fields(wrong, 0, native=True), stock.facts, native=True)


def logprobs(draw: Any, num_rows: int, *, is_tensor: bool) -> tuple[Any, list[Any]]:
    """Draw vLLM's object, and what the decoder is to give for it."""
    import numpy as np
    import torch
    from vllm.v1.outputs import LogprobsLists, LogprobsTensors

    width = draw(st.integers(1, 40))
    token = draw(st.integers(0, 2**31 - 1))
    # A slice of a wider array, as the engine makes them, is not contiguous.
    wide = (np.arange(num_rows * (width + 1), dtype=np.int64) * 7919 + token) % 2**31
    wide = wide.astype(draw(st.sampled_from([np.int32, np.int64])))
    ids = wide.reshape(num_rows, width + 1)[:, :width]
    values = -np.arange(num_rows * width, dtype=np.float32).reshape(num_rows, width) / 8
    ranks = np.arange(1, num_rows + 1, dtype=draw(st.sampled_from([np.int32, np.int64])))
    expected = [
        ([(int(i), float(v)) for i, v in zip(ids[row], values[row], strict=True)], int(ranks[row]))
        for row in range(num_rows)
    ]
    if is_tensor:
        tensors = [torch.from_numpy(np.ascontiguousarray(x)) for x in (ids, values, ranks)]
        return LogprobsTensors(*tensors), expected
    return LogprobsLists(ids, values, ranks), expected


@st.composite
def messages(draw: Any) -> tuple[Any, dict[str, Any]]:
    """Draw an EngineCoreOutputs and what its decoding is to give."""
    from vllm.v1.engine import (
        EngineCoreEvent,
        EngineCoreEventType,
        EngineCoreOutput,
        EngineCoreOutputs,
        FinishReason,
        UtilityOutput,
    )
    from vllm.v1.metrics.stats import PrefillStats, SchedulerStats
    from vllm.v1.serial_utils import UtilityResult

    outputs, rows, preemptions = [], [], 0
    for _ in range(draw(st.integers(0, 4))):
        key = draw(st.integers(1, 2**64 - 1))
        tokens = draw(st.lists(st.integers(-1, 2**31 - 1), max_size=4))
        output = EngineCoreOutput(f"{draw(st.text(max_size=8))}-{key:x}", tokens)
        number, cached, found, of_prompt = 0, None, None, None
        if draw(st.booleans()):
            output.finish_reason = draw(st.sampled_from(list(FinishReason)))
            number = {FinishReason.STOP: 1, FinishReason.LENGTH: 2, FinishReason.ABORT: 3}.get(
                output.finish_reason, 4
            )
            output.stop_reason = draw(
                st.none() | st.integers(-1, 2**31 - 1) | st.text(min_size=1, max_size=40)
            )
        if draw(st.booleans()):
            cached = draw(st.integers(0, 9999))
            output.prefill_stats = PrefillStats(num_prompt_tokens=10000, num_cached_tokens=cached)
        if tokens and draw(st.booleans()):
            output.new_logprobs, found = logprobs(draw, len(tokens), is_tensor=False)
        if draw(st.booleans()):
            count = draw(st.integers(1, 3))
            output.new_prompt_logprobs_tensors, of_prompt = logprobs(draw, count, is_tensor=True)
        if draw(st.booleans()):
            types = draw(st.lists(st.sampled_from(list(EngineCoreEventType)), max_size=3))
            output.events = [EngineCoreEvent(kind, 1.5) for kind in types]
            preemptions += types.count(EngineCoreEventType.PREEMPTED)
        outputs.append(output)
        is_plain = number == 0 and cached is None and found is None and of_prompt is None
        rest = None if is_plain else (number, output.stop_reason, cached, found, of_prompt)
        rows.append((key, tokens, rest))
    message = EngineCoreOutputs(outputs=outputs)
    stats = None
    if draw(st.booleans()):
        stats = draw(st.tuples(st.integers(0, 9), st.integers(0, 9), st.floats(0, 1)))
        message.scheduler_stats = SchedulerStats(
            num_running_reqs=stats[0], num_waiting_reqs=stats[1], num_skipped_waiting_reqs=2,
            kv_cache_usage=stats[2],
        )  # fmt: skip
        stats = (stats[0], stats[1] + 2, stats[2])
    if draw(st.booleans()):
        message.utility_output = UtilityOutput(5, None, UtilityResult([{"a": 1}, 2.5, None]))
    message.finished_requests = draw(st.none() | st.just({"a", "b"}))
    return message, {"rows": rows, "stats": stats, "preemptions": preemptions}


@settings(max_examples=400)
@given(messages())
def test_a_step_is_what_the_engine_core_encoded(drawn: tuple[Any, dict[str, Any]]) -> None:
    from vllm.v1.serial_utils import MsgpackEncoder

    message, expected = drawn
    decoder = _core.CoreOutputs()
    decoder.decode(MsgpackEncoder().encode(message))
    assert decoder.rows() == expected["rows"]
    assert decoder.stats == expected["stats"]
    assert decoder.num_preemptions == expected["preemptions"]
    assert decoder.has_utility == (message.utility_output is not None)


@settings(max_examples=200)
@given(messages(), st.data())
def test_a_broken_message_is_refused_whole(drawn: tuple[Any, dict[str, Any]], data: Any) -> None:
    from vllm.v1.serial_utils import MsgpackEncoder

    frames = [bytes(frame) for frame in MsgpackEncoder().encode(drawn[0])]
    decoder = _core.CoreOutputs()
    cut = data.draw(st.integers(0, len(frames[0]) - 1))
    with pytest.raises(_core.WireError):
        decoder.decode([frames[0][:cut], *frames[1:]])
    assert decoder.num_rows == 0
    damaged = bytearray(frames[0])
    for at in data.draw(st.lists(st.integers(0, len(damaged) - 1), min_size=1, max_size=4)):
        damaged[at] = data.draw(st.integers(0, 255))
    try:
        decoder.decode([bytes(damaged), *frames[1:]])
    except _core.WireError:
        assert decoder.num_rows == 0


def test_a_message_without_frames_and_one_without_its_tensors() -> None:
    import numpy as np
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
    from vllm.v1.outputs import LogprobsLists
    from vllm.v1.serial_utils import MsgpackEncoder

    decoder = _core.CoreOutputs()
    with pytest.raises(_core.WireError, match="without frames"):
        decoder.decode([])
    wide = np.zeros((1, 200), np.float32)
    output = EngineCoreOutput("r-1", [1], LogprobsLists(wide.astype(np.int32), wide, np.ones(1, np.int32)))
    frames = MsgpackEncoder().encode(EngineCoreOutputs(outputs=[output]))
    assert len(frames) == 3
    with pytest.raises(_core.WireError, match="frame is missing"):
        decoder.decode(frames[:1])
    with pytest.raises(_core.WireError, match="not as long"):
        decoder.decode([frames[0], frames[1], bytes(12)])
    # What is wrong is told without the message's own bytes, which may be no text.
    with pytest.raises(_core.WireError, match="unknown type"):
        decoder.decode([bytes(frames[0]).replace(b"<f4", b"\xff\xff\xff"), *frames[1:]])


def test_the_mock_speaks_as_the_engine_core_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The benchmark's mock is read by vLLM's own decoder, every field of it."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "bench" / "frontend"))
    import mock_core
    from vllm.v1.engine import EngineCoreOutputs, EngineCoreReadyResponse
    from vllm.v1.metrics.stats import SchedulerStats
    from vllm.v1.serial_utils import MsgpackDecoder

    assert list(mock_core.SCHEDULER_STATS) == [f.name for f in dataclasses.fields(SchedulerStats)]
    names = {f.name for f in dataclasses.fields(EngineCoreReadyResponse)}
    assert set(mock_core.ready_response(100)) == names
    sent: list[Any] = []
    core = mock_core.MockCore(mock_core.Control.create(tmp_path / "control"), [300, 4000])
    core._output = type("Socket", (), {"send": staticmethod(sent.extend)})
    for name, tokens in (("a-1", 1), ("b-2", 2)):
        core._waiting.append(mock_core._Stream(name, tokens, 3, None))
    core._make_step()
    core._make_step()
    first, second = (MsgpackDecoder(EngineCoreOutputs).decode(message) for (message,) in sent)
    assert [o.request_id for o in first.outputs] == ["a-1", "b-2"]
    assert [str(o.finish_reason) for o in first.outputs] == ["length", "None"]
    assert first.outputs[0].prefill_stats.num_prompt_tokens == 3
    assert [(o.request_id, str(o.finish_reason)) for o in second.outputs] == [("b-2", "length")]
    assert second.scheduler_stats.step_counter == 2
    monkeypatch.delitem(sys.modules, "mock_core")
