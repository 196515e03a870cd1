"""The vLLM engine with our sampler and block manager inside, on the demo model and CPU."""

import asyncio
import json
import math
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import pytest_asyncio

from tests.engines.vllm.support import GREEDY, OPTIONS, QUESTIONS, chat_prompt, collect, request, stop
from twinjet.engines.vllm.front import prestart
from twinjet.engines.vllm.front.engine import VllmEngine
from twinjet.errors import RequestFailed
from twinjet.request import Constraint
from twinjet.sampling import SPEC_VERSION

pytestmark = [
    pytest.mark.engine,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.filterwarnings("default"),
    pytest.mark.timeout(900),
]

SAMPLED = replace(GREEDY, temperature=0.8, top_p=0.95, max_tokens=24)

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["old", "new", "wet"]}, "maxItems": 2},
    },
    "required": ["city", "size", "tags"],
    "additionalProperties": False,
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(offline: list[dict[str, Any]], demo_model_path: Path) -> AsyncIterator[VllmEngine]:
    # Without this a grammar allows white space without end, and a small model takes it up.
    options = OPTIONS | {"structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True}}
    made = VllmEngine(
        "demo", str(demo_model_path), options, native_sampler=True, native_block_manager=True, kv_events=True
    )
    await made.start(lambda progress: None)
    yield made
    await stop(made)
    prestart.stop()


def _prompt(engine: VllmEngine, text: str = "Once upon a time") -> list[int]:
    return engine.tokenizer.encode(text, add_special_tokens=False)


async def _counters(engine: VllmEngine) -> dict[str, int]:
    assert engine._running is not None
    await engine._running.components.refresh()
    return dict(engine.describe().sampler.counters)


async def test_greedy_equals_the_offline_engine_token_for_token(
    engine: VllmEngine, offline: list[dict[str, Any]]
) -> None:
    for i, (question, expected) in enumerate(zip(QUESTIONS, offline, strict=True)):
        prompt = chat_prompt(engine.tokenizer, question)
        answer = await collect(engine, request(f"greedy-{i}", prompt, replace(GREEDY, max_tokens=24)))
        assert answer.only.token_ids == expected["token_ids"], question


async def test_constrained_generations_validate(engine: VllmEngine) -> None:
    constraint = Constraint("json_schema", json.dumps(SCHEMA))
    gate = asyncio.Semaphore(24)

    async def one(seed: int) -> str:
        sampling = replace(SAMPLED, constraint=constraint, max_tokens=160, seed=seed)
        async with gate:
            output = (await collect(engine, request(f"json-{seed}", _prompt(engine), sampling))).only
        assert output.finish is not None
        assert output.finish.reason == "stop"
        return output.text

    texts = await asyncio.gather(*(one(seed) for seed in range(80)))
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert len(set(texts)) > 40


async def test_a_row_without_a_token_ends_its_request_alone(engine: VllmEngine) -> None:
    digits = Constraint("regex", "[0-9]{4}")
    letters = tuple(engine.tokenizer.encode("abc", add_special_tokens=False))
    masked = replace(SAMPLED, allowed_token_ids=letters, bad_words=("a", "b", "c", "abc"))
    wanted = {
        "grammar": replace(SAMPLED, constraint=digits, allowed_token_ids=letters),
        "masks": replace(masked, include_stop=True),
    }
    for name, sampling in wanted.items():
        neighbour = asyncio.create_task(collect(engine, request("neighbour", _prompt(engine), SAMPLED)))
        with pytest.raises(RequestFailed) as raised:
            await collect(engine, request(name, _prompt(engine), sampling))
        assert raised.value.reason == "NO_ADMISSIBLE_TOKEN"
        assert len((await neighbour).only.token_ids) == 24
    assert (await _counters(engine))["rows_without_token"] >= 2


async def test_a_seed_draws_the_same_alone_and_in_a_batch(engine: VllmEngine) -> None:
    """Batches change the logits a little on CPU too; a drawn text may follow only where they are equal."""
    prompt = _prompt(engine)
    allowed = replace(SAMPLED, allowed_token_ids=tuple(range(1000, 1200)), temperature=50.0, max_tokens=8)
    alone = (await collect(engine, request("alone", prompt, allowed))).only.token_ids
    together = await asyncio.gather(
        *(collect(engine, request(f"b{i}", prompt, replace(allowed, seed=max(1, i)))) for i in range(12))
    )
    assert together[0].only.token_ids == alone
    assert together[1].only.token_ids == alone
    assert len({tuple(answer.only.token_ids) for answer in together}) == 11


async def test_every_field_is_drawn_natively(engine: VllmEngine) -> None:
    before = await _counters(engine)
    everything = replace(
        SAMPLED, top_k=20, min_p=0.01, repetition_penalty=1.2, frequency_penalty=0.3, presence_penalty=0.2,
        logit_bias={5: 1.0}, min_tokens=3, bad_words=("the",), allowed_token_ids=tuple(range(40000)), n=2,
        logprobs=4,
    )  # fmt: skip
    answer = await collect(engine, request("all", _prompt(engine), everything))
    for output in answer.outputs.values():
        for entry in output.logprobs:
            assert [top.rank for top in entry.top] == [1, 2, 3, 4]
            assert sum(math.exp(top.logprob) for top in entry.top) <= 1 + 1e-5
    after = await _counters(engine)
    assert after["rows"] > before["rows"]
    assert not any(name.startswith("stock_steps") for name in after)


@pytest.mark.parametrize("word", ["Paris", " Paris", " ", "\n", "AB", "capital"])
async def test_a_banned_string_is_in_no_text_whatever_its_tokens(engine: VllmEngine, word: str) -> None:
    """Drawn hot and pushed towards the string's own tokens."""
    spellings = (word, f" {word}", word.strip() or "x", *word)
    pushed = {i for s in spellings for i in engine.tokenizer.encode(s, add_special_tokens=False)}
    sampling = replace(
        SAMPLED, temperature=1.5, n=4, bad_words=(word, "never"), max_tokens=40, ignore_eos=True,
        logit_bias=dict.fromkeys(pushed, 8.0),
    )  # fmt: skip
    found = await collect(engine, request("banned", _prompt(engine), sampling))
    assert len(found.outputs) == 4
    for output in found.outputs.values():
        assert len(output.token_ids) == 40
        assert word not in output.text
        assert word not in engine.tokenizer.decode(output.token_ids, skip_special_tokens=True)


async def test_temperatures_that_vllm_refuses(engine: VllmEngine) -> None:
    for temperature in (0.001, 3.0, 100.0):
        sampling = replace(SAMPLED, temperature=temperature, max_tokens=4, top_p=1.0)
        assert (await collect(engine, request("hot", _prompt(engine), sampling))).only.token_ids


async def test_description_names_our_components(engine: VllmEngine) -> None:
    await _counters(engine)
    info = engine.describe()
    assert (info.sampler.implementation, info.sampler.version) == ("twinjet", str(SPEC_VERSION))
    assert info.sampler.target in {"scalar", "avx2", "avx512", "cuda"}
    assert info.block_manager.implementation == "twinjet"
    assert (info.sampler.reason, info.block_manager.reason) == ("", "")
    assert info.block_manager.counters["rows_scheduled"] > 0


async def test_the_journal_follows_the_prefix_cache(engine: VllmEngine) -> None:
    assert "kv_events" in engine.describe().capabilities
    journal = engine.kv_journal
    prompt = _prompt(engine, "A prompt that fills some blocks, so that there is something to tell. " * 8)
    answer = await collect(engine, request("kv", prompt, replace(GREEDY, max_tokens=40), cache_salt="mine"))
    tokens = [*prompt, *answer.only.token_ids]
    info = engine.describe()
    assert info.kv_cache is not None
    size = info.kv_cache.block_size
    # The last token's keys and values were never needed.
    num_full = (len(tokens) - 1) // size

    def told() -> list[int]:
        """The tokens of the blocks under the salt, put together by their parents."""
        mine = {b.parent_hash: (h, b) for h, b in journal._blocks.items() if b.facts.salt == "mine"}
        found, parent = [], b""
        while parent in mine:
            parent, block = mine[parent]
            found += block.token_ids
        return found

    async with asyncio.timeout(60):
        while len(told()) < num_full * size:
            await asyncio.sleep(0.01)
    assert told() == tokens[: num_full * size]
    assert await engine.reset_prefix_cache()
    async with asyncio.timeout(60):
        while len(journal):
            await asyncio.sleep(0.01)
