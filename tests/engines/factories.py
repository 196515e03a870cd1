"""The engines that the contract suite runs on, each started and stopped the same way."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from twinjet.engines.base import Engine
from twinjet.engines.fake import FakeEngine
from twinjet.request import EngineRequest, SamplingOverrides, resolve_sampling

DOUBLES = Path(__file__).parents[1] / "doubles"
MODEL = DOUBLES / "model"


@dataclass(frozen=True)
class Subject:
    """An engine under test. has_words: prompts such as "!fail" make it misbehave. draws: it really samples.

    With "-plain" the engine's own sampler draws.
    """

    name: str
    has_words: bool
    draws: bool


SUBJECTS = (
    Subject("fake", has_words=True, draws=False),
    Subject("fake-logits", has_words=True, draws=True),
    Subject("tensorrt_llm-1.2", has_words=True, draws=True),
    Subject("tensorrt_llm-1.3", has_words=True, draws=True),
    Subject("tensorrt_llm-1.2-plain", has_words=True, draws=True),
    Subject("tensorrt_llm-1.3-plain", has_words=True, draws=True),
)


_imported: dict[tuple[str, str], dict[str, ModuleType]] = {}


@contextlib.contextmanager
def double_installed(version: str, plant: str = "") -> Iterator[None]:
    """Make `import tensorrt_llm` give the stand-in of a version; each version is imported once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORRT_LLM_DOUBLE", version)
        patch.setenv("TENSORRT_LLM_DOUBLE_PLANT", plant)
        patch.syspath_prepend(str(DOUBLES))
        sys.modules.update(_imported.get((version, plant), {}))
        try:
            yield
        finally:
            names = [name for name in sys.modules if name.partition(".")[0] == "tensorrt_llm"]
            _imported[version, plant] = {name: sys.modules.pop(name) for name in names}


def make_trt(options: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    """Make the TensorRT-LLM engine on the installed stand-in, not started."""
    from twinjet.engines.tensorrt_llm.front.engine import TrtLlmEngine

    return TrtLlmEngine("toy", str(MODEL), {"max_seq_len": 4096} | (options or {}), **kwargs)


@contextlib.asynccontextmanager
async def running(name: str, **options: Any) -> AsyncIterator[Engine]:
    """Start the engine of that name and stop it again."""
    with contextlib.ExitStack() as stack:
        engine: Any
        if name.startswith("fake"):
            engine = FakeEngine(name, {"output": "logits"} if name == "fake-logits" else {})
        else:
            _, version, *rest = name.split("-")
            stack.enter_context(double_installed(version))
            if rest:
                options = {"guided_decoding_backend": "xgrammar"} | options
            engine = make_trt(options, native_sampler=not rest)
        try:
            await engine.start(lambda _: None)
            yield engine
        finally:
            await engine.stop()


def make_request(
    engine: Engine, prompt: str = "Hello there", request_id: str = "r", *, seed: int = 7, **sampling: Any
) -> EngineRequest:
    """Make a request as the server does: resolved against what the engine says of itself."""
    info = engine.describe()
    ids = engine.tokenizer.encode(prompt, add_special_tokens=True)
    extra = {k: sampling.pop(k) for k in ("priority", "cache_salt", "adapter") if k in sampling}
    resolved = resolve_sampling(
        SamplingOverrides(**{"max_tokens": 24} | sampling), info, num_prompt_tokens=len(ids), seed=seed
    )
    return EngineRequest(request_id=request_id, prompt_token_ids=tuple(ids), sampling=resolved, **extra)
