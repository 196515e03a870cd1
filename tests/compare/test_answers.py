"""Whether both sides say the same: natural answers, each side's own repetition, where they part, schemas, tokenizers."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import pytest

from tests.models.simulated_twins import EngineTarget, Machine, SimulatedEngine
from tests.models.virtual_time import run_virtual
from twinjet.client import Model
from twinjet.compare import analysis, workload
from twinjet.compare.driver import Arrived, Driver
from twinjet.compare.effective import check_equal, effective_settings
from twinjet.compare.records import Record, RunData
from twinjet.compare.report import as_html, as_text, make_report
from twinjet.compare.sameness import SchemaCheck
from twinjet.compare.statistics import Precision
from twinjet.errors import ConfigError
from twinjet.request import SamplingOverrides

SETTINGS = analysis.Settings(max_cpu=float("inf"))
NUM_SAME = 6


class Deviant:
    """Says what another target says, but for one token of some answers."""

    def __init__(self, inner: EngineTarget, indices: set[int], place: int) -> None:
        self.name = inner.name
        self._inner = inner
        self._indices = indices
        self._place = place

    async def run(
        self, item: workload.WorkItem, sampling: SamplingOverrides, cache_salt: str
    ) -> AsyncGenerator[Arrived, None]:
        count = 0
        async for arrived in self._inner.run(item, sampling, cache_salt):
            ids = list(arrived.token_ids)
            if item.index in self._indices and count <= self._place < count + len(ids):
                # The runner-up of the token, so that A tells its logprob.
                ids[self._place - count] += 1
            count += len(ids)
            yield replace(arrived, token_ids=ids)


async def _answers(
    *,
    deviant: bool,
    num_logprobs: int | None = 3,
    sampling: SamplingOverrides | None = None,
    **options: Any,
) -> RunData:
    machine = Machine(1)
    engines = SimulatedEngine("a", machine), SimulatedEngine("b", machine)
    for engine in engines:
        engine._options = engine._options.model_copy(update=options)
        await engine.start(lambda _: None)
    a, b = (EngineTarget(name, engine) for name, engine in zip("ab", engines, strict=True))
    running = Driver(
        a,
        Deviant(b, {1, 4}, 5) if deviant else b,
        workload.Workload(
            workload.synthetic(8, 16, 64, vocab_size=256), sampling=sampling or SamplingOverrides()
        ),
        workload.Load("closed", concurrency=4),
        4,
        Precision(max_blocks=10),
        num_same=NUM_SAME,
        num_logprobs=num_logprobs,
    )
    await running.run_sameness()
    for engine in engines:
        await engine.stop()
    return running.data


def test_equal_sides_are_equal_to_each_other_and_to_themselves() -> None:
    data = run_virtual(_answers(deviant=False))
    found = analysis.answers(data)
    assert found.is_natural and found.own_a is not None and found.own_b is not None
    for one in (found.both, found.own_a, found.own_b):
        assert (one.num_pairs, one.num_equal_pairs, one.equal_tokens) == (NUM_SAME, NUM_SAME, 1.0)
        assert one.divergence == 0.0 and one.median_margin is None
    assert found.examples == () and found.valid_a is None


def test_seeded_draws_are_equal_where_logits_are_equal() -> None:
    sampling = SamplingOverrides(temperature=0.9, top_p=0.95)
    data = run_virtual(_answers(deviant=False, sampling=sampling, output="logits", num_logprobs=None))
    found = analysis.answers(data)
    assert found.both.num_equal_pairs == found.both.num_pairs == NUM_SAME
    # They are draws: other seeds give other answers.
    assert len({record.token_ids for record in data.records}) == NUM_SAME


def test_where_answers_part_is_told_with_its_margin() -> None:
    data = run_virtual(_answers(deviant=True))
    data.header = {"names": ["A", "B"], "metric": "token_time"}
    found = analysis.answers(data)
    assert (found.both.num_equal_pairs, found.both.num_pairs) == (NUM_SAME - 2, NUM_SAME)
    assert found.both.equal_tokens == pytest.approx((4 * 16 + 2 * 5) / (6 * 16))
    # The fake engine's runner-up has half a nat less than its choice.
    assert found.both.median_margin == pytest.approx(0.5) and found.both.median_place == 5
    assert found.own_b is not None and found.own_b.num_equal_pairs == NUM_SAME
    assert [(e.index, e.place) for e in found.examples] == [(1, 5), (4, 5)]
    report = make_report(data, SETTINGS)
    told = as_text(report)
    assert "same answers (natural lengths): 4 of 6, 77.1% of tokens equal" in told
    assert "logit margin 0.5 nats in the median, 0.5 at most" in told
    page = as_html(report, data)
    assert "<table id='examples'>" in page and "answers equal so far" in page


def test_answers_end_where_the_model_ends_them_and_the_rest_of_the_run_has_fixed_lengths() -> None:
    data = run_virtual(_answers(deviant=False, output_tokens=7))
    assert {record.reason for record in data.records} == {"stop"}
    assert {len(record.token_ids) for record in data.records} == {8}
    assert analysis.answers(data).reasons_a == {"stop": NUM_SAME}


def test_without_logprobs_the_margin_is_not_known_rather_than_zero() -> None:
    found = analysis.answers(run_virtual(_answers(deviant=True, num_logprobs=None)))
    assert found.both.median_margin is None and found.both.divergence is None and found.both.median_place == 5


def test_answers_are_checked_against_the_schema() -> None:
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}
    texts = {"a": ['{"a": 1}', '{"a": 2}'], "b": ['{"a": "x"}', "not JSON"]}
    data = RunData({"names": ["A", "B"], "metric": "token_time", "json_schema": json.dumps(schema)})
    for arm, legs in (("a", (0, 3)), ("b", (1, 2))):
        for leg in legs:
            data.legs.append(analysis.LegFacts("sameness", 0, leg, arm, 1.0, 0.0))  # type: ignore[arg-type]
            for index, text in enumerate(texts[arm]):
                data.records.append(
                    Record("sameness", 0, leg, arm, index, 0.0, 0.0, 1.0, (1.0,), (1,), "stop", text=text)  # type: ignore[arg-type]
                )
    found = analysis.answers(data)
    assert (found.valid_a, found.num_a, found.valid_b, found.num_b) == (2, 2, 0, 2)
    assert "valid by the schema: A 2 of 2, B 0 of 2" in as_text(make_report(data, SETTINGS))


@pytest.mark.parametrize("schema", ["{", "3", '{"type": "no such type"}'])
def test_what_is_no_schema_is_refused(schema: str) -> None:
    with pytest.raises(ConfigError, match="not a JSON schema"):
        SchemaCheck(schema)


def _model(**changed: Any) -> Model:
    from twinjet.client import EngineInfo, ModelLimits, Sampling

    values: dict[str, Any] = {
        "name": "m", "deployment": "d", "state": "ready", "loading": None, "failure": "",
        "engine": EngineInfo("fake", "1", "cpu", ""), "limits": ModelLimits(64, 258, 1, 5, 8),
        "capabilities": frozenset(), "default_sampling": Sampling(), "sampler": None, "block_manager": None,
        "kv_cache": None, "eos_token_ids": (2,), "settings": {},
    }  # fmt: skip
    return Model(**values | changed)


def test_different_tokenizers_are_refused_with_the_reason_and_cannot_be_allowed() -> None:
    a, b = effective_settings(_model(), (1, 2, 3)), effective_settings(_model(), (1, 2, 4))
    with pytest.raises(ConfigError, match=r"different tokenizers.*tokenizer: \w+ and \w+"):
        check_equal(a, b, ["all"])
    check_equal(a, effective_settings(_model(), (1, 2, 3)), [])
    bigger = _model(limits=replace(_model().limits, vocab_size=300))  # type: ignore[type-var]
    with pytest.raises(ConfigError, match="vocab_size: 258 and 300"):
        check_equal(a, effective_settings(bigger, (1, 2, 3)), ["all"])


def test_a_model_that_is_not_ready_is_refused_with_its_state() -> None:
    from twinjet.client import LoadingProgress

    loading = _model(state="loading", loading=LoadingProgress("loading weights", 0.4, 3.0))
    with pytest.raises(ConfigError, match=r"'m' is loading \(loading weights, 40%\)"):
        effective_settings(loading, ())
    with pytest.raises(ConfigError, match="'m' is failed: no such folder"):
        effective_settings(_model(state="failed", failure="no such folder"), ())
