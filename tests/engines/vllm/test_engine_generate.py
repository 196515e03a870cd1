"""The vLLM engine on the demo model and CPU: everything that a running engine must do."""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.engines.vllm.support import GREEDY, OPTIONS, QUESTIONS, chat_prompt, collect, request, stop
from twinjet.engines.base import LoadProgress, OutputEvent
from twinjet.engines.vllm.front import prestart
from twinjet.engines.vllm.front.engine import VllmEngine
from twinjet.errors import AlreadyExists, InvalidRequest, NotFound, RequestAborted, Unsupported
from twinjet.request import Constraint

pytestmark = [
    pytest.mark.engine,
    pytest.mark.asyncio(loop_scope="module"),
    # vLLM and torch warn while they are imported.
    pytest.mark.filterwarnings("default"),
    pytest.mark.timeout(600),
]

SAMPLED = replace(GREEDY, temperature=0.9, top_p=0.95, max_tokens=24)


@pytest.fixture(scope="module")
def progress() -> list[LoadProgress]:
    return []


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(
    offline: list[dict[str, Any]], demo_model_path: Path, progress: list[LoadProgress]
) -> AsyncIterator[VllmEngine]:
    prestart.prestart()
    made = VllmEngine("demo", str(demo_model_path), OPTIONS, native_sampler=False, native_block_manager=False)
    await made.start(progress.append)
    yield made
    await stop(made)
    prestart.stop()


def _prompt(engine: VllmEngine, text: str = "The capital of France is") -> list[int]:
    return engine.tokenizer.encode(text, add_special_tokens=False)


def _mapped(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


async def _until_idle(engine: VllmEngine) -> None:
    async with asyncio.timeout(10):
        while (await engine.load()).running:
            await asyncio.sleep(0.02)


async def test_loading_reports_phases_that_only_advance(
    engine: VllmEngine, progress: list[LoadProgress]
) -> None:
    shares = [p.done for p in progress]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert len({p.phase for p in progress}) >= 6


async def test_greedy_equals_the_offline_engine_token_for_token(
    engine: VllmEngine, offline: list[dict[str, Any]]
) -> None:
    for i, (question, expected) in enumerate(zip(QUESTIONS, offline, strict=True)):
        prompt = chat_prompt(engine.tokenizer, question)
        answer = await collect(engine, request(f"greedy-{i}", prompt, replace(GREEDY, max_tokens=24)))
        assert answer.only.token_ids == expected["token_ids"], question
        # vLLM itself leaves out a character that the end cuts.
        assert answer.only.text.removesuffix("\ufffd") == expected["text"]
        assert len(prompt) == expected["num_prompt_tokens"]
        assert answer.only.finish is not None
        assert answer.only.finish.reason == expected["finish_reason"]


async def test_end_token_is_named(engine: VllmEngine) -> None:
    (eos, *_) = engine.describe().eos_token_ids
    sampling = replace(GREEDY, logit_bias={eos: 100.0})
    finish = (await collect(engine, request("eos", _prompt(engine), sampling))).only.finish
    assert finish is not None
    assert (finish.reason, finish.stopped_by, finish.is_eos) == ("stop", eos, True)
    sampling = replace(sampling, ignore_eos=True, max_tokens=3)
    output = (await collect(engine, request("ignore", _prompt(engine), sampling))).only
    assert output.token_ids == [eos] * 3
    assert output.finish is not None
    assert output.finish.reason == "length"


async def test_min_tokens_hold_the_end_token_back(engine: VllmEngine) -> None:
    (eos, *_) = engine.describe().eos_token_ids
    sampling = replace(GREEDY, logit_bias={eos: 100.0}, min_tokens=4)
    output = (await collect(engine, request("min", _prompt(engine), sampling))).only
    assert eos not in output.token_ids[:4]
    assert output.token_ids[4:] == [eos]


async def test_the_prompt_is_never_output_nor_stops_it(engine: VllmEngine) -> None:
    secret = "My secret is 1234. Hello world"
    half = _prompt(engine, secret + "\U0001f336")[:-1]
    for i, prompt in enumerate([_prompt(engine, secret + "\ufffd"), half]):
        sampling = replace(GREEDY, max_tokens=6, logit_bias=dict.fromkeys(_prompt(engine, "s"), 50.0))
        output = (await collect(engine, request(f"half-{i}", prompt, sampling))).only
        assert output.text == engine.tokenizer.decode(output.token_ids, skip_special_tokens=True) == "ssssss"
        stopped = replace(sampling, stop=("secret", "ds", "\ufffd"))
        output = (await collect(engine, request(f"half-stop-{i}", prompt, stopped))).only
        assert output.text == "ssssss"


async def test_half_a_character_is_cut_by_the_end(engine: VllmEngine) -> None:
    peppers = "\U0001f336\U0001f336"
    ids = _prompt(engine, peppers)
    for size in range(1, len(ids) + 1):
        sampling = replace(GREEDY, max_tokens=size, constraint=Constraint("choice", choices=(peppers,)))
        output = (await collect(engine, request(f"cut-{size}", _prompt(engine), sampling))).only
        assert output.text == engine.tokenizer.decode(output.token_ids, skip_special_tokens=True)
    assert "\ufffd" not in output.text


async def test_a_stop_string_ends_the_engines_work(engine: VllmEngine) -> None:
    whole = (await collect(engine, request("whole", _prompt(engine), replace(GREEDY, max_tokens=12)))).only
    sampling = replace(GREEDY, max_tokens=1500, stop=(whole.text[6:10],))
    output = (await collect(engine, request("stop", _prompt(engine), sampling))).only
    assert output.text == whole.text[:6]
    assert output.finish is not None
    assert output.finish.stopped_by == whole.text[6:10]
    assert output.token_ids == whole.token_ids[: len(output.token_ids)]
    await _until_idle(engine)


async def test_logprobs_have_ranks_and_texts(engine: VllmEngine) -> None:
    prompt = _prompt(engine)
    sampling = replace(SAMPLED, logprobs=3, prompt_logprobs=2)
    answer = await collect(engine, request("logprobs", prompt, sampling))
    assert answer.prompt is not None
    assert answer.prompt.logprobs is not None
    assert [entry.chosen.token_id for entry in answer.prompt.logprobs] == prompt[1:]
    assert len(answer.only.logprobs) == len(answer.only.token_ids)
    for token_id, entry in zip(answer.only.token_ids, answer.only.logprobs, strict=True):
        assert entry.chosen.token_id == token_id
        assert [top.rank for top in entry.top] == [1, 2, 3]
        assert all(a.logprob >= b.logprob for a, b in zip(entry.top, entry.top[1:], strict=False))
        assert entry.chosen.logprob <= entry.top[0].logprob <= 0
        text = engine.tokenizer.decode([token_id], skip_special_tokens=False)
        assert entry.chosen.text == text
    plain = await collect(engine, request("plain", prompt, replace(SAMPLED, logprobs=0)))
    assert all(entry.top == () for entry in plain.only.logprobs)


async def test_outputs_are_reproducible_and_their_own(engine: VllmEngine) -> None:
    prompt = _prompt(engine, "Once upon a time")
    three = replace(SAMPLED, n=3, seed=2**64 - 1)
    first = await collect(engine, request("n-1", prompt, three))
    again = await collect(engine, request("n-2", prompt, three))
    assert sorted(first.outputs) == [0, 1, 2]
    texts = [first.outputs[i].text for i in range(3)]
    assert texts == [again.outputs[i].text for i in range(3)]
    assert len(set(texts)) == 3
    neighbour = await collect(engine, request("n-3", prompt, replace(three, seed=2**64 - 2)))
    assert not set(texts) & {output.text for output in neighbour.outputs.values()}


async def test_stop_strings(engine: VllmEngine) -> None:
    prompt = _prompt(engine, "1, 2, 3, 4, 5,")
    sampling = replace(GREEDY, max_tokens=32, stop=(" 8,", "never"))
    output = (await collect(engine, request("stop", prompt, sampling))).only
    assert output.finish is not None
    assert (output.finish.reason, output.finish.stopped_by) == ("stop", " 8,")
    assert output.text == " 6, 7,"
    kept = replace(sampling, include_stop=True)
    assert (await collect(engine, request("kept", prompt, kept))).only.text == " 6, 7, 8,"


async def test_stop_token_ids(engine: VllmEngine) -> None:
    prompt = _prompt(engine)
    (first,) = (await collect(engine, request("one", prompt, replace(GREEDY, max_tokens=1)))).only.token_ids
    output = (await collect(engine, request("st", prompt, replace(GREEDY, stop_token_ids=(first,))))).only
    assert output.finish is not None
    assert (output.finish.stopped_by, output.finish.is_eos) == (first, False)


async def test_masks_and_biases(engine: VllmEngine) -> None:
    prompt = _prompt(engine)
    (best,) = (await collect(engine, request("m0", prompt, replace(GREEDY, max_tokens=1)))).only.token_ids
    banned = replace(GREEDY, max_tokens=1, bad_words=(" Paris",))
    assert "bad_words" not in engine.describe().capabilities
    with pytest.raises(Unsupported, match="bad_words"):
        await collect(engine, request("m1", prompt, banned))
    pushed = replace(GREEDY, max_tokens=1, logit_bias={best: -100.0})
    assert (await collect(engine, request("m1", prompt, pushed))).only.token_ids != [best]
    allowed = replace(SAMPLED, allowed_token_ids=(5, 6), max_tokens=12, ignore_eos=True)
    drawn = (await collect(engine, request("m2", prompt, allowed))).only.token_ids
    assert len(drawn) == 12
    assert set(drawn) <= {5, 6}
    biased = replace(GREEDY, max_tokens=2, logit_bias={77: 100.0})
    assert (await collect(engine, request("m3", prompt, biased))).only.token_ids == [77, 77]


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        (Constraint("regex", "[0-9]{3}-[a-c]{2}"), r"[0-9]{3}-[a-c]{2}"),
        (Constraint("choice", choices=("Rome", "Paris")), r"Rome|Paris"),
        (Constraint("ebnf", 'root ::= "yes" | "no"'), r"yes|no"),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
async def test_constraints(engine: VllmEngine, constraint: Constraint, pattern: str) -> None:
    sampling = replace(SAMPLED, constraint=constraint)
    output = (await collect(engine, request("c", _prompt(engine), sampling))).only
    assert re.fullmatch(pattern, output.text)
    assert output.finish is not None
    assert output.finish.reason == "stop"


async def test_json_schema(engine: VllmEngine) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Paris"]}, "size": {"type": "integer", "maximum": 99}},
        "required": ["city", "size"],
        "additionalProperties": False,
    }
    sampling = replace(SAMPLED, constraint=Constraint("json_schema", json.dumps(schema)), max_tokens=64)
    value = json.loads((await collect(engine, request("js", _prompt(engine), sampling))).only.text)
    assert value["city"] in {"Rome", "Paris"}
    assert isinstance(value["size"], int)


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint("json_schema", "{"),
        Constraint("json_schema", '{"type": "nonsense"}'),
        Constraint("regex", "(a"),
        Constraint("ebnf", "root ::= other"),
    ],
    ids=repr,
)
async def test_a_grammar_that_does_not_compile_is_the_clients_mistake(
    engine: VllmEngine, constraint: Constraint
) -> None:
    with pytest.raises(InvalidRequest) as raised:
        await collect(engine, request("bad", _prompt(engine), replace(GREEDY, constraint=constraint)))
    (violation,) = raised.value.violations
    assert violation.field == f"sampling.constraint.{constraint.kind}"


async def test_prefixes_are_shared_within_a_salt_only(engine: VllmEngine) -> None:
    prompt = list(range(100, 300))
    cached = []
    for i, salt in enumerate(["a", "a", "b"]):
        answer = await collect(engine, request(f"salt-{i}", prompt, GREEDY, cache_salt=salt))
        assert answer.prompt is not None
        cached.append(answer.prompt.num_cached_tokens)
    assert cached == [0, 192, 0]
    assert await engine.reset_prefix_cache()
    answer = await collect(engine, request("salt-3", prompt, GREEDY, cache_salt="a"))
    assert answer.prompt is not None
    assert answer.prompt.num_cached_tokens == 0


async def test_closing_the_iterator_aborts(engine: VllmEngine) -> None:
    long = replace(SAMPLED, max_tokens=1500, ignore_eos=True, n=2)
    stream = engine.generate(request("close", _prompt(engine), long))
    async for event in stream:
        if isinstance(event, OutputEvent):
            break
    assert (await engine.load()).running
    await stream.aclose()
    await _until_idle(engine)
    assert (await engine.load()).kv_blocks_used == 0


async def test_cancelling_the_reader_aborts(engine: VllmEngine) -> None:
    long = replace(SAMPLED, max_tokens=1500, ignore_eos=True)
    for delay in (0.0, 0.001, 0.3):
        task = asyncio.create_task(collect(engine, request("cancel", _prompt(engine), long)))
        await asyncio.sleep(delay)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert task.cancelled()
        await _until_idle(engine)
    assert (await collect(engine, request("after", _prompt(engine)))).only.token_ids


async def test_abort_ends_the_iterator_with_an_error(engine: VllmEngine) -> None:
    long = replace(SAMPLED, max_tokens=1500, ignore_eos=True)
    stream = engine.generate(request("abort", _prompt(engine), long))
    await anext(stream)
    await anext(stream)
    await engine.abort("abort")
    with pytest.raises(RequestAborted):
        await anext(stream)
    await _until_idle(engine)
    await engine.abort("unknown")


async def test_many_streams_with_cancels_leave_nothing_behind(engine: VllmEngine) -> None:
    async def one(i: int) -> str:
        sampling = replace(SAMPLED, max_tokens=20, ignore_eos=True, seed=i)
        try:
            async with asyncio.timeout(0.05 * i if i % 3 == 0 else 120):
                answer = await collect(engine, request(f"many-{i}", _prompt(engine), sampling))
        except TimeoutError:
            return "cancelled"
        assert len(answer.only.token_ids) == 20
        return "finished"

    ends = await asyncio.gather(*(one(i) for i in range(48)))
    assert ends.count("finished") >= 32
    await _until_idle(engine)
    load = await engine.load()
    assert (load.running, load.waiting, load.kv_blocks_used) == (0, 0, 0)


async def test_a_request_id_cannot_run_twice(engine: VllmEngine) -> None:
    long = replace(SAMPLED, max_tokens=1500, ignore_eos=True)
    stream = engine.generate(request("twice", _prompt(engine), long))
    await anext(stream)
    with pytest.raises(AlreadyExists):
        await collect(engine, request("twice", _prompt(engine)))
    await stream.aclose()


async def test_temperature_beyond_vllms_range_is_refused(engine: VllmEngine) -> None:
    with pytest.raises(InvalidRequest, match="temperature"):
        await collect(engine, request("hot", _prompt(engine), replace(SAMPLED, temperature=3.0)))


async def test_what_the_model_lacks_is_unsupported(engine: VllmEngine) -> None:
    with pytest.raises(NotFound, match="adapter"):
        await collect(engine, request("lora", _prompt(engine), GREEDY, adapter="none"))
    with pytest.raises(Unsupported, match="adapters"):
        await engine.load_adapter("a", "/nowhere")
    with pytest.raises(Unsupported, match="embed"):
        await engine.embed("e", [1, 2], None)


async def test_description(engine: VllmEngine) -> None:
    info = engine.describe()
    assert info.name == "vllm"
    assert info.version.startswith("0.32")
    assert info.device == "cpu"
    assert info.limits.max_context_tokens == OPTIONS["max_model_len"]
    assert info.limits.max_num_seqs == OPTIONS["max_num_seqs"]
    assert info.limits.vocab_size == 49152
    assert {"generate", "chat", "json_schema", "prefix_cache", "priority"} <= info.capabilities
    assert not {"embed", "adapters", "kv_events"} & info.capabilities
    assert info.sampler.implementation == "engine"
    assert info.sampler.reason
    assert info.kv_cache is not None
    assert info.kv_cache.num_blocks == (await engine.load()).kv_blocks_total


async def test_the_chosen_openmp_is_loaded(engine: VllmEngine) -> None:
    assert engine._running is not None
    (process,) = engine._running.context.processes
    library = prestart._intel_openmp() or prestart._torch_openmp()
    assert library is not None
    assert str(library) in _mapped(process.pid)
