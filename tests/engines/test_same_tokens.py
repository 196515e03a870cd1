"""One model without weights under different engines: the native sampler draws the same tokens in all."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engines.factories import make_request, running
from tests.engines.test_contract import collect

SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.6, "top_p": 0.9},
    {"temperature": 1.7, "top_k": 12},
    {"top_k": 20, "top_p": 0.8, "min_p": 0.02},
    {"repetition_penalty": 1.4, "frequency_penalty": 0.5, "presence_penalty": -0.3},
    {"logit_bias": {97: 4.0, 98: -100.0}, "bad_words": ("z", "ab")},
    {"allowed_token_ids": tuple(range(97, 107)), "min_tokens": 5},
    {"n": 3, "min_p": 0.1},
]


@pytest.mark.parametrize("version", ["1.2", "1.3"])
async def test_fake_and_tensorrt_llm_draw_the_same(version: str) -> None:
    async with running("fake-logits") as fake, running(f"tensorrt_llm-{version}") as trt:
        for settings in SETTINGS:
            for seed in (1, 2**64 - 1):
                request = make_request(fake, seed=seed, max_tokens=48, **settings)
                ours, theirs = await collect(fake, request), await collect(trt, request)
                assert ours.tokens == theirs.tokens, f"{settings} with seed {seed}"
                assert ours.finish == theirs.finish


@pytest.mark.parametrize("overlap", [True, False])
async def test_the_overlap_scheduler_changes_nothing(overlap: bool) -> None:
    async with running("fake-logits") as fake:
        expected = await collect(fake, make_request(fake, max_tokens=64, repetition_penalty=1.3))
    async with running("tensorrt_llm-1.2", disable_overlap_scheduler=not overlap) as trt:
        outcome = await collect(trt, make_request(trt, max_tokens=64, repetition_penalty=1.3))
    assert outcome.tokens == expected.tokens
