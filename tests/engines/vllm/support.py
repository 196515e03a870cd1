"""What the tests of the vLLM engine share."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from twinjet.engines.base import ChatTurn, Finish, OutputEvent, PromptEvent, TokenLogprobs
from twinjet.engines.vllm.fields import EXTRA_KEY
from twinjet.grammar.room import GrammarRoom
from twinjet.request import EngineRequest, Sampling
from twinjet.server.grammar import Grammars

GREEDY = Sampling(
    temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0, frequency_penalty=0.0,
    presence_penalty=0.0, logit_bias={}, seed=1, n=1, max_tokens=8, min_tokens=0, stop=(), stop_token_ids=(),
    include_stop=False, ignore_eos=False, bad_words=(), allowed_token_ids=(), logprobs=None,
    prompt_logprobs=None, skip_special_tokens=True, constraint=None,
)  # fmt: skip

QUESTIONS = [
    "What is the capital of France?", "Name three colours.", "Write one sentence about the sea.",
    "How many days has a week?", "What is 2 + 2?", "Who wrote Hamlet?", "Name a large city in Japan.",
    "What do bees make?", "Say hello in Spanish.", "What is water made of?", "Name a planet.",
    "Is the sun a star?", "What is the opposite of hot?", "Name an animal that can fly.",
    "What is the largest ocean?", "Write a short list of fruits.", "What is a triangle?",
    "Name a musical instrument.", "What does a baker do?", "Count from one to five.",
]  # fmt: skip

OPTIONS = {"max_num_seqs": 32, "max_model_len": 2048, "dtype": "float32"}


def request(request_id: str, prompt: Iterable[int], sampling: Sampling = GREEDY, **kw: Any) -> EngineRequest:
    return EngineRequest(request_id=request_id, prompt_token_ids=tuple(prompt), sampling=sampling, **kw)


def chat_prompt(tokenizer: Any, question: str) -> list[int]:
    text = tokenizer.render_chat([ChatTurn("user", question)], continue_final=False)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def native_params(**changed: Any) -> Any:
    """Look like the SamplingParams that the engine makes for our sampler: seed 5, output 0."""
    fields = {
        "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "frequency_penalty": 0.0,
        "presence_penalty": 0.0, "logit_bias": None, "allowed_token_ids": None,
        "min_tokens": 0, "all_stop_token_ids": set(), "logprobs": None, "logprob_token_ids": None,
        "thinking_token_budget": None, "trace_decode_token_ids": None,
        "extra_args": {EXTRA_KEY: {"temperature": 1.0, "seed": 5, "output_index": 0}},
    }  # fmt: skip
    return SimpleNamespace(**(fields | changed))


@dataclass
class Output:
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: Finish | None = None


@dataclass
class Answer:
    prompt: PromptEvent | None = None
    outputs: dict[int, Output] = field(default_factory=dict)

    @property
    def only(self) -> Output:
        assert list(self.outputs) == [0]
        return self.outputs[0]


_grammars: dict[Any, Grammars] = {}


async def prepared(engine: Any, wanted: EngineRequest) -> EngineRequest:
    """Have a request's constraint compiled, as the server does."""
    constraint = wanted.sampling.constraint
    if constraint is None:
        return wanted
    grammars = _grammars.setdefault(engine, Grammars(GrammarRoom()))
    return replace(
        wanted, grammar=await grammars.prepare(engine, constraint, tenant="", deadline=wanted.deadline)
    )


async def stop(engine: Any) -> None:
    """Stop an engine, and what compiled its grammars."""
    if (grammars := _grammars.pop(engine, None)) is not None:
        await grammars.close()
    await engine.stop()


async def collect(engine: Any, wanted: EngineRequest) -> Answer:
    """Run a request to its end, checking the order of its events."""
    wanted = await prepared(engine, wanted)
    answer = Answer()
    async for event in engine.generate(wanted):
        if isinstance(event, PromptEvent):
            assert answer.prompt is None
            assert not answer.outputs
            answer.prompt = event
            continue
        assert isinstance(event, OutputEvent)
        assert answer.prompt is not None
        output = answer.outputs.setdefault(event.output_index, Output())
        assert output.finish is None
        output.text += event.text
        output.token_ids += event.token_ids
        output.logprobs += event.logprobs
        output.finish = event.finish
    assert all(output.finish is not None for output in answer.outputs.values())
    return answer


def descendants(pid: int) -> list[int]:
    """List the live processes below one, itself left out."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if stat[0] != "Z":
                parents[int(entry.name)] = int(stat[1])
    found = [pid]
    for known in found:
        found += [child for child, parent in parents.items() if parent == known]
    return found[1:]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
