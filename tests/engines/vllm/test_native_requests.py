"""The native sampler's request table with look-alikes of vLLM's parameters; no vLLM needed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engines.vllm.support import native_params
from twinjet._core import TokenTexts, Vocabulary
from twinjet.engines.vllm.core.requests import RequestTable, reason_for_stock
from twinjet.engines.vllm.fields import EXTRA_KEY, NO_TOKEN
from twinjet.sampling import Request, Sampler

VOCAB = 64


def draw(request: Request, logits: np.ndarray[Any, Any]) -> int:
    return int(Sampler(1).sample(logits, [request]).token_ids[0])


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, ""),
        ({"extra_args": None}, "foreign_request"),
        ({"logprobs": -1}, "all_logprobs"),
        ({"logprobs": 5}, ""),
        ({"logprob_token_ids": [1]}, "logprobs_of_chosen_ids"),
        ({"thinking_token_budget": 3}, "thinking_budget"),
        ({"trace_decode_token_ids": [3]}, "trace_replay"),
    ],
)
def test_what_goes_to_vllms_sampler(changed: dict[str, Any], reason: str) -> None:
    assert reason_for_stock(native_params(**changed), [1]) == reason
    assert reason_for_stock(native_params(**changed), None) != ""


def test_a_sequence_follows_its_output_however_it_came_about() -> None:
    """Steps of vLLM's own sampler, dropped tokens and preemption leave the draw at a position the same."""
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(6, VOCAB)).astype(np.float32)
    wanted, table = [], RequestTable(VOCAB)
    for row in rows:
        request = table.get("a", native_params(), [1, 2, 3], wanted)
        assert isinstance(request, Request)
        wanted.append(draw(request, row))
    again = RequestTable(VOCAB)
    request = again.get("a", native_params(), [1, 2, 3], [])
    assert isinstance(request, Request)
    draw(request, rows[0])
    draw(request, rows[1])
    assert again.get("a", native_params(), [1, 2, 3], wanted[:1]) is request
    assert draw(request, rows[1]) == wanted[1]
    assert again.get("a", native_params(), [1, 2, 3], wanted[:5]) is request
    assert draw(request, rows[5]) == wanted[5]
    again.forget(["a", "unknown"])
    assert len(again) == 0


def test_tokens_that_the_host_does_not_know_yet_leave_the_request_to_vllm() -> None:
    table = RequestTable(VOCAB)
    assert isinstance(table.get("a", native_params(), [1], []), Request)
    assert table.get("a", native_params(), [1], [4, -1]) == "tokens_not_known"
    assert table.get("a", native_params(), [1], [4, 5]) == "tokens_not_known", "its position is lost for good"


def test_every_field_reaches_the_native_request(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    letters = Vocabulary("byte_level", [chr(33 + i) for i in range(VOCAB)], special=[])
    texts.write_bytes(TokenTexts(letters).save())
    flat = np.zeros((1, VOCAB), np.float32)

    def first(**changed: Any) -> int:
        request = RequestTable(VOCAB).get("a", native_params(**changed), [7], [])
        assert isinstance(request, Request)
        return draw(request, flat)

    greedy: dict[str, Any] = {"extra_args": {EXTRA_KEY: {"temperature": 0.0, "seed": 5, "output_index": 1}}}
    assert first(**greedy) == 0
    assert first(**greedy, allowed_token_ids=[9, 11]) == 9
    assert first(**greedy, logit_bias={3: 2.0}) == 3
    assert first(**greedy, min_tokens=1, all_stop_token_ids={0, 1, NO_TOKEN}) == 2
    greedy["extra_args"][EXTRA_KEY]["bad_text"] = [str(texts), ["!", '"'], True]
    assert first(**greedy) == 2
    assert first(**greedy, allowed_token_ids=[1]) == -1
    drawn = {
        first(extra_args={EXTRA_KEY: {"temperature": 1.0, "seed": seed, "output_index": index}})
        for seed in range(8)
        for index in range(8)
    }
    assert len(drawn) > 20
