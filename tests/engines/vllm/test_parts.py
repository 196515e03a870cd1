"""What an engine says it can do, by what its process says is in use; no vLLM needed."""

from typing import Any

import pytest

from twinjet.engines.base import Component, EngineInfo
from twinjet.engines.vllm.front.parts import PLAIN_SCHEDULER, WORKER, Components, Parts


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
        "vllm", "0.32.0", "m", frozenset(), none, none, max_model_len=64, vocab_size=8, eos_token_ids=()
    )  # type: ignore[call-arg]
    components = Components(link, info, Parts(PLAIN_SCHEDULER, worker))
    await components.complete()
    assert ("bad_words" in components.info().capabilities) == has
