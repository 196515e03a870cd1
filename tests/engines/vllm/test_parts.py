"""What an engine says it can do, by what its process says is in use; no vLLM needed."""

from typing import Any

import pytest

from twinjet.engines.base import Component, EngineInfo, Limits
from twinjet.engines.vllm.front.parts import PLAIN_SCHEDULER, WORKER, Components, Parts
from twinjet.request import SamplingOverrides


class FixedLink:
    """Answers each call of the engine core from a table."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers = answers

    async def call(self, method: str, *arguments: Any) -> Any:
        return self.answers[method]


@pytest.mark.parametrize(
    ("worker", "version", "target", "has"),
    [
        (WORKER, 1, "avx2", True),
        (WORKER, 1, "cuda", True),
        (WORKER, 0, "", False),
        (None, 0, "", False),
    ],
)
async def test_bad_words_are_taken_wherever_our_sampler_draws(
    worker: str | None, version: int, target: str, has: bool
) -> None:
    drawn = {"spec_version": version, "target": target, "counters": {}, "reason": "none"}
    link: Any = FixedLink({"get_supported_tasks": ["generate"], "collective_rpc": [drawn]})
    none = Component("engine", "0")
    info = EngineInfo(
        name="vllm",
        version="0.32.0",
        device="none",
        source="none",
        limits=Limits(64, 8, 1, 0, 1),
        capabilities=frozenset(),
        default_sampling=SamplingOverrides(),
        eos_token_ids=(),
        sampler=none,
        block_manager=none,
        kv_cache=None,
    )
    components = Components(link, info, Parts(PLAIN_SCHEDULER, worker))
    await components.complete()
    assert ("bad_words" in components.info().capabilities) == has
