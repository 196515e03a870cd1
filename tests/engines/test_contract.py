"""What every engine must do, whatever is inside; see twinjet.engines.base.Engine."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from tests.engines.factories import SUBJECTS, Subject, make_request, running
from twinjet.engines.base import Capability, Engine, EngineEvent, Finish, OutputEvent, PromptEvent
from twinjet.errors import EngineDied, RequestAborted, RequestFailed, Unsupported
from twinjet.request import Constraint, EngineRequest


@pytest.fixture(params=SUBJECTS, ids=lambda subject: subject.name)
def subject(request: pytest.FixtureRequest) -> Subject:
    return request.param


@pytest.fixture
async def engine(subject: Subject) -> AsyncIterator[Engine]:
    async with running(subject.name) as started:
        yield started


class Outcome:
    """The events of one request, checked for their order and put together by output."""

    def __init__(self, events: list[EngineEvent]) -> None:
        first, *rest = events
        assert isinstance(first, PromptEvent)
        self.prompt = first
        self.events = rest
        self.text: dict[int, str] = defaultdict(str)
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.logprobs: dict[int, list[Any]] = defaultdict(list)
        self.finish: dict[int, Finish] = {}
        for event in rest:
            assert isinstance(event, OutputEvent)
            assert event.output_index not in self.finish, "an event after the finish of its output"
            self.text[event.output_index] += event.text
            self.tokens[event.output_index] += event.token_ids
            self.logprobs[event.output_index] += event.logprobs
            if event.finish is not None:
                self.finish[event.output_index] = event.finish


async def collect(engine: Engine, request: EngineRequest) -> Outcome:
    async with asyncio.timeout(30):
        return Outcome([event async for event in engine.generate(request)])


def honours(engine: Engine, capability: Capability, **sampling: Any) -> bool:
    """Say whether the engine can do something; if not, make sure that it is refused by name."""
    if capability in engine.describe().capabilities:
        return True
    with pytest.raises(Unsupported) as refusal:
        make_request(engine, **sampling)
    assert refusal.value.capability == capability
    return False


def repeatable(engine: Engine) -> dict[str, Any]:
    """Give sampling parameters under which two runs draw the same tokens."""
    return {} if "seed" in engine.describe().capabilities else {"temperature": 0.0}


async def until_idle(engine: Engine) -> None:
    async with asyncio.timeout(10):
        while (await engine.load()).running:
            await asyncio.sleep(0.005)


async def test_describes_itself_in_range(engine: Engine) -> None:
    info = engine.describe()
    assert info.limits.max_context_tokens > 1
    assert info.limits.vocab_size == engine.tokenizer.vocab_size
    assert all(0 <= token < info.limits.vocab_size for token in info.eos_token_ids)
    assert info.eos_token_ids
    assert info.kv_cache is not None
    assert "generate" in info.capabilities


async def test_ends_after_max_tokens(engine: Engine) -> None:
    outcome = await collect(engine, make_request(engine, max_tokens=11, ignore_eos=True))
    assert len(outcome.tokens[0]) == 11
    assert outcome.finish == {0: Finish("length")}


async def test_deltas_join_to_the_text_of_all_tokens(engine: Engine) -> None:
    outcome = await collect(engine, make_request(engine, max_tokens=40, ignore_eos=True))
    assert outcome.text[0] == engine.tokenizer.decode(outcome.tokens[0], skip_special_tokens=True)


async def test_each_of_n_outputs_has_its_own_finish(engine: Engine) -> None:
    outcome = await collect(engine, make_request(engine, n=4, max_tokens=9, ignore_eos=True))
    assert sorted(outcome.finish) == [0, 1, 2, 3]
    assert {len(tokens) for tokens in outcome.tokens.values()} == {9}
    assert len({tuple(tokens) for tokens in outcome.tokens.values()}) == 4, "outputs should differ"


async def test_the_same_seed_gives_the_same_tokens(engine: Engine) -> None:
    if "seed" not in engine.describe().capabilities:
        pytest.skip("does not claim seeds")
    first = await collect(engine, make_request(engine, seed=5))
    again = await collect(engine, make_request(engine, seed=5))
    other = await collect(engine, make_request(engine, seed=6))
    assert first.tokens == again.tokens
    assert first.tokens != other.tokens


async def test_greedy_does_not_depend_on_the_seed(engine: Engine) -> None:
    by_temperature = await collect(engine, make_request(engine, temperature=0.0, seed=1))
    by_top_k = await collect(engine, make_request(engine, top_k=1, seed=2))
    assert by_temperature.tokens == by_top_k.tokens


async def test_logprobs_belong_to_tokens_one_to_one(engine: Engine) -> None:
    if not honours(engine, "logprobs", logprobs=3):
        return
    outcome = await collect(engine, make_request(engine, logprobs=3, n=2))
    for index, tokens in outcome.tokens.items():
        assert len(outcome.logprobs[index]) == len(tokens)
        assert all(len(entry.top) == 3 for entry in outcome.logprobs[index])
        assert [entry.chosen.token_id for entry in outcome.logprobs[index]] == tokens


async def test_zero_logprobs_are_the_token_alone(engine: Engine) -> None:
    if not honours(engine, "logprobs", logprobs=0):
        return
    outcome = await collect(engine, make_request(engine, logprobs=0))
    assert len(outcome.logprobs[0]) == len(outcome.tokens[0])
    assert all(entry.top == () for entry in outcome.logprobs[0])


async def test_prompt_logprobs_leave_out_the_first_token_only(engine: Engine) -> None:
    if not honours(engine, "prompt_logprobs", prompt_logprobs=2):
        return
    # Twice, since the second prompt could come from the prefix cache, without logits.
    for request_id in ("first", "second"):
        request = make_request(engine, "a prompt of more than one block " * 4, request_id, prompt_logprobs=2)
        outcome = await collect(engine, request)
        assert outcome.prompt.logprobs is not None
        assert [entry.chosen.token_id for entry in outcome.prompt.logprobs] == list(
            request.prompt_token_ids[1:]
        )
        assert all(len(entry.top) == 2 for entry in outcome.prompt.logprobs)


async def test_unasked_logprobs_are_absent(engine: Engine) -> None:
    outcome = await collect(engine, make_request(engine))
    assert outcome.prompt.logprobs is None
    assert not outcome.logprobs[0]


async def test_a_stop_string_is_cut_and_named(engine: Engine) -> None:
    whole = (await collect(engine, make_request(engine, ignore_eos=True, **repeatable(engine)))).text[0]
    stop = whole[7:10]
    cut = await collect(
        engine, make_request(engine, ignore_eos=True, **repeatable(engine), stop=(stop, "never to be seen"))
    )
    kept = await collect(
        engine, make_request(engine, ignore_eos=True, **repeatable(engine), stop=(stop,), include_stop=True)
    )
    assert cut.text[0] == whole[: whole.index(stop)]
    assert kept.text[0] == whole[: whole.index(stop) + 3]
    assert cut.finish[0] == kept.finish[0] == Finish("stop", stop)


async def test_a_stop_string_ends_its_own_output_only(engine: Engine) -> None:
    if "seed" not in engine.describe().capabilities:
        pytest.skip("several outputs cannot be had twice")
    whole = await collect(engine, make_request(engine, n=2, ignore_eos=True))
    stop = whole.text[0][3:8]
    assert stop not in whole.text[1]
    outcome = await collect(engine, make_request(engine, n=2, ignore_eos=True, stop=(stop,)))
    assert outcome.finish == {0: Finish("stop", stop), 1: Finish("length")}
    assert outcome.tokens[1] == whole.tokens[1]


async def test_a_stop_token_ends_the_output_and_leaves_no_text(engine: Engine) -> None:
    whole = (await collect(engine, make_request(engine, ignore_eos=True, **repeatable(engine)))).tokens[0]
    stop = whole[6]
    at = whole.index(stop)
    outcome = await collect(
        engine, make_request(engine, ignore_eos=True, **repeatable(engine), stop_token_ids=(stop,))
    )
    assert outcome.tokens[0] == whole[: at + 1], "the stop token counts"
    assert outcome.text[0] == engine.tokenizer.decode(whole[:at], skip_special_tokens=True)
    assert outcome.finish[0] == Finish("stop", stop)


@pytest.mark.parametrize("prompt", ["My secret is 1234\ufffd", "secret \U0001f336"])
async def test_nothing_of_the_prompt_is_output(engine: Engine, prompt: str) -> None:
    """Whatever it ends with: U+FFFD, or, a token short, half a character."""
    request = make_request(engine, prompt, ignore_eos=True, stop=("secret", "1234"))
    request = replace(request, prompt_token_ids=request.prompt_token_ids[:-1])
    outcome = await collect(engine, request)
    assert outcome.text[0] == engine.tokenizer.decode(outcome.tokens[0], skip_special_tokens=True)
    assert outcome.finish[0] == Finish("length")


async def test_half_a_character_is_cut_by_the_end(engine: Engine) -> None:
    if "choice" not in engine.describe().capabilities:
        pytest.skip("has no choices")
    pepper = Constraint("choice", choices=("\U0001f336" * 2,))
    for size in range(1, 8):
        outcome = await collect(engine, make_request(engine, constraint=pepper, max_tokens=size))
        assert outcome.text[0] == ("\U0001f336" * 2).encode()[:size].decode(errors="replace")


async def test_logprobs_show_parts_of_characters(engine: Engine) -> None:
    if not honours(engine, "logprobs", logprobs=5):
        return
    asked = {"prompt_logprobs": 0} if honours(engine, "prompt_logprobs", prompt_logprobs=0) else {}
    outcome = await collect(engine, make_request(engine, logprobs=5, **asked))
    for entry in outcome.logprobs[0]:
        for each in (entry.chosen, *entry.top):
            text = engine.tokenizer.decode([each.token_id], skip_special_tokens=False)
            assert each.text == text
            assert text


async def test_min_tokens_hold_back_a_stop_string(engine: Engine) -> None:
    if not honours(engine, "min_tokens", min_tokens=8):
        return
    steady = repeatable(engine)
    whole = (await collect(engine, make_request(engine, ignore_eos=True, **steady))).text[0]
    once = {**steady, "ignore_eos": True, "stop": (whole[1], whole[8:10])}
    assert (await collect(engine, make_request(engine, **once))).text[0] == whole[:1]
    held = await collect(engine, make_request(engine, min_tokens=8, **once))
    assert held.text[0] == whole[: min(whole.find(stop, 8) for stop in once["stop"] if stop in whole[8:])]


async def test_a_choice_is_kept(engine: Engine) -> None:
    choices = ("yes", "no", "maybe")
    outcome = await collect(engine, make_request(engine, constraint=Constraint("choice", choices=choices)))
    assert outcome.text[0] in choices
    assert outcome.finish[0].is_eos
    assert outcome.finish[0].stopped_by == outcome.tokens[0][-1]


async def test_many_requests_run_at_once(engine: Engine) -> None:
    steady = repeatable(engine)
    requests = [
        make_request(engine, request_id=f"r{i}", seed=i, max_tokens=10 + i, **steady) for i in range(12)
    ]
    together = await asyncio.gather(*(collect(engine, request) for request in requests))
    alone = [await collect(engine, request) for request in requests]
    assert [o.tokens for o in together] == [o.tokens for o in alone], "others must not matter"


async def test_an_abort_ends_the_stream_and_frees_the_engine(engine: Engine) -> None:
    request = make_request(engine, max_tokens=4000, ignore_eos=True)
    with pytest.raises(RequestAborted):  # noqa: PT012 - the error comes out of the loop
        async for event in engine.generate(request):
            if isinstance(event, OutputEvent):
                await engine.abort("r")
    await until_idle(engine)


async def test_aborting_the_unknown_is_nothing(engine: Engine) -> None:
    await engine.abort("nobody")


async def test_closing_the_stream_frees_the_engine(engine: Engine) -> None:
    events = engine.generate(make_request(engine, n=3, max_tokens=4000, ignore_eos=True))
    async for event in events:
        if isinstance(event, OutputEvent):
            break
    await events.aclose()
    await until_idle(engine)
    assert (await collect(engine, make_request(engine))).finish


async def test_a_cancelled_reader_frees_the_engine(engine: Engine) -> None:
    reading = asyncio.create_task(collect(engine, make_request(engine, max_tokens=4000, ignore_eos=True)))
    async with asyncio.timeout(10):
        while not (await engine.load()).running:
            await asyncio.sleep(0.001)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await until_idle(engine)


async def test_one_failure_leaves_others_alone(subject: Subject, engine: Engine) -> None:
    if not subject.has_words:
        pytest.skip("cannot be told to fail")
    good = asyncio.create_task(collect(engine, make_request(engine, request_id="good", max_tokens=60)))
    with pytest.raises(RequestFailed):
        await collect(engine, make_request(engine, "!fail:3", "bad"))
    assert (await good).finish


async def test_death_ends_every_request(subject: Subject, engine: Engine) -> None:
    if not subject.has_words:
        pytest.skip("cannot be told to die")
    others = [
        asyncio.create_task(collect(engine, make_request(engine, "!stall", f"other{i}"))) for i in range(3)
    ]
    with pytest.raises(EngineDied):
        await collect(engine, make_request(engine, "!die:2", "bad"))
    for other in others:
        with pytest.raises(EngineDied):
            await other
    async with asyncio.timeout(5):
        assert await engine.wait_dead()
    with pytest.raises(EngineDied):
        await collect(engine, make_request(engine, request_id="late"))


async def test_stop_is_idempotent(engine: Engine) -> None:
    await engine.stop()
    await engine.stop()
    with pytest.raises(EngineDied):
        await collect(engine, make_request(engine))


async def test_min_tokens_hold_back_the_end(subject: Subject, engine: Engine) -> None:
    if not subject.draws:
        pytest.skip("does not sample")
    eos = engine.describe().eos_token_ids[0]
    likely_end = {"logit_bias": {eos: 100.0}, "max_tokens": 12}
    if not honours(engine, "min_tokens", min_tokens=5):
        return
    at_once = await collect(engine, make_request(engine, **likely_end))
    later = await collect(engine, make_request(engine, min_tokens=5, **likely_end))
    assert at_once.tokens[0] == [eos]
    assert at_once.finish[0] == Finish("stop", eos, is_eos=True)
    assert later.tokens[0].index(eos) == 5


async def test_allowed_and_bad_tokens_are_kept(subject: Subject, engine: Engine) -> None:
    if not subject.draws:
        pytest.skip("does not sample")
    allowed = tuple(engine.tokenizer.encode("abc", add_special_tokens=False))
    if not honours(engine, "allowed_token_ids", allowed_token_ids=allowed):
        return
    outcome = await collect(
        engine, make_request(engine, allowed_token_ids=allowed, ignore_eos=True, max_tokens=50)
    )
    assert set(outcome.text[0]) == set("abc")
    without = await collect(
        engine,
        make_request(
            engine, allowed_token_ids=allowed, bad_words=("a", "bb"), ignore_eos=True, max_tokens=50
        ),
    )
    assert "a" not in without.text[0]
    assert "bb" not in without.text[0]


async def test_penalties_work(subject: Subject, engine: Engine) -> None:
    if not subject.draws:
        pytest.skip("does not sample")
    if not honours(engine, "penalties", repetition_penalty=50.0):
        return
    plain = await collect(engine, make_request(engine, temperature=0.0, max_tokens=30, ignore_eos=True))
    spread = await collect(
        engine,
        make_request(engine, temperature=0.0, max_tokens=20, ignore_eos=True, repetition_penalty=50.0),
    )
    assert len(set(plain.tokens[0])) < 30
    assert len(set(spread.tokens[0])) == 20, "no token twice under so large a penalty"
