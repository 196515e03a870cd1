"""The service on a GPU with the demo model's own text, through both doors.

    python -m pytest -m gpu tests/gpu/test_served.py        # needs a CUDA device, vLLM's CUDA build, the extension's CUDA side
    TWINJET_GPU_TESTS=cpu python -m pytest -m gpu tests/gpu/test_served.py        # the same on vLLM's CPU build

What is shown here is what steps that are under way while the host goes on could break: outputs that begin and end,
grammars, adapters, preemption, cached prefixes, cancels, deadlines, banned strings, and an engine's death.
"""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import jsonschema
import pytest
from grpc_health.v1 import health_pb2

from tests.server.processes import Service, descendants, server
from twinjet.v1 import generation_pb2, model_pb2, sampling_pb2

ON_CPU = os.environ.get("TWINJET_GPU_TESTS") == "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        "TWINJET_GPU_TESTS" not in os.environ and not Path("/dev/nvidiactl").exists(), reason="no CUDA device"
    ),
]

Request = generation_pb2.GenerateRequest
Options = generation_pb2.RequestOptions
Sampling = sampling_pb2.SamplingParams
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING

# "tight" holds a little more than one full context, so that streams together run out of blocks; fcfs, because our
# own admission would keep some of them waiting.
SETTINGS = """
[deployments.roomy]
model = "demo"
[deployments.roomy.options]
dtype = "bfloat16"
enable_lora = true
max_lora_rank = 8
max_num_seqs = 64
max_model_len = 2048
block_size = 32
gpu_memory_utilization = 0.05
kv_cache_memory_bytes = 4000000000
[deployments.roomy.scheduler]
predict_deadlines = false
[deployments.tight]
model = "demo"
[deployments.tight.options]
dtype = "float32"
enforce_eager = true
max_num_seqs = 16
max_model_len = 1024
block_size = 32
num_gpu_blocks_override = 40
gpu_memory_utilization = 0.05
kv_cache_memory_bytes = 1000000000
[deployments.tight.scheduler]
policy = "fcfs"
"""


def make_adapter(folder: Path, model: Path, scale: float) -> Path:
    """Write a LoRA adapter of rank 8 for the attention; with scale 0 it changes nothing."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    width = config.get("head_dim") or hidden // heads
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name, rows in (("q_proj", heads * width), ("v_proj", config["num_key_value_heads"] * width)):
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{at}.lora_A.weight"] = torch.randn(8, hidden, generator=generator) / hidden**0.5
            weights[f"{at}.lora_B.weight"] = torch.randn(rows, 8, generator=generator) * scale
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "bias": "none"}))
    return folder


class Served(Service):
    """A server with both deployments."""

    def run(self, sampling: dict[str, Any], **request: Any) -> dict[int, tuple[str, list[int]]]:
        """Give each output's text and tokens, checking that its stream ended in order."""
        outputs: dict[int, tuple[str, list[int]]] = {}
        request = {"model": "roomy", "text": "Once upon a time"} | request
        events = list(self.inference.Generate(Request(sampling=Sampling(**sampling), **request)))
        kinds = [event.WhichOneof("event") for event in events]
        assert (kinds[0], kinds[-1]) == ("started", "summary")
        assert kinds.count("finished") == sampling.get("n", 1)
        assert events[-1].summary.sampler == "twinjet"
        for event in events:
            if event.HasField("delta"):
                text, tokens = outputs.get(event.delta.output_index, ("", []))
                outputs[event.delta.output_index] = (
                    text + event.delta.text,
                    [*tokens, *event.delta.token_ids],
                )
        return outputs

    def together(self, wanted: list[dict[str, Any]]) -> list[dict[int, tuple[str, list[int]]]]:
        with ThreadPoolExecutor(len(wanted)) as pool:
            return list(pool.map(lambda arguments: self.run(**arguments), wanted))

    def counters(self, model: str) -> dict[str, int]:
        found = self.models.GetModel(model_pb2.GetModelRequest(model=model)).model
        assert (found.sampler.implementation, found.block_manager.implementation) == ("twinjet", "twinjet")
        assert ON_CPU or found.sampler.target == "cuda"
        return {**found.block_manager.counters, **found.sampler.counters}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, demo_model_path: Path) -> Iterator[dict[str, Served]]:
    """Start one server for each door, at the same time."""
    folders = {door: tmp_path_factory.mktemp(door) for door in ("grpc", "native")}
    adapters = {
        name: make_adapter(tmp_path_factory.mktemp("adapters") / name, demo_model_path, scale)
        for name, scale in (("still", 0.0), ("loud", 2.0))
    }
    with ExitStack() as stack, ThreadPoolExecutor(2) as pool:

        def start(door: str) -> Served:
            running = server(folders[door], SETTINGS, environment={"TWINJET_SERVER__DOOR": door})
            served = Served(*stack.enter_context(running))
            served.until(lambda: all(served.status(m) == SERVING for m in ("roomy", "tight")), 240)
            for name, path in adapters.items():
                served.models.LoadAdapter(
                    model_pb2.LoadAdapterRequest(model="roomy", name=name, path=str(path))
                )
            return served

        yield dict(zip(folders, pool.map(start, folders), strict=True))


@pytest.fixture(params=["grpc", "native"])
def served(servers: dict[str, Served], request: pytest.FixtureRequest) -> Served:
    return servers[request.param]


def test_outputs_of_one_request_differ_and_answer(served: Served) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    texts = [""] * 16
    sampling = Sampling(n=16, seed=1, max_tokens=40, temperature=0.2, top_p=0.95)
    for event in served.inference.Chat(
        generation_pb2.ChatRequest(model="roomy", messages=question, sampling=sampling)
    ):
        texts[event.delta.output_index] += event.delta.text
    assert sum("Paris" in text for text in texts) >= 15, texts
    stories = served.run({"n": 8, "seed": 7, "max_tokens": 32, "temperature": 1.0})
    assert len({text for text, _ in stories.values()}) == 8


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{1,12}$"},
        "age": {"type": "integer", "minimum": 1, "maximum": 99},
        "pets": {"type": "array", "items": {"enum": ["cat", "dog"]}, "maxItems": 3},
    },
    "required": ["name", "age", "pets"],
    "additionalProperties": False,
}


def test_grammars_hold_beside_free_text(served: Served) -> None:
    constraints: list[dict[str, Any]] = [
        {"json_schema": json.dumps(SCHEMA)},
        {"regex": "[a-f]{3}-[0-9]{2,5}"},
        {"choice": {"values": ["north", "south by southwest", "no"]}},
        {"ebnf": 'root ::= ("ab" | "cd")+ "."'},
    ]
    drawn = {"temperature": 0.9, "max_tokens": 150}
    wanted = [
        {"sampling": {**drawn, "seed": i + 1} | ({} if i % 5 == 4 else {"constraint": constraints[i % 5]})}
        for i in range(40)
    ]
    answers = served.together(wanted)
    checked = 0
    for i, answer in enumerate(answers):
        text, tokens = answer[0]
        if len(tokens) == drawn["max_tokens"]:
            continue
        checked += 1
        match i % 5:
            case 0:
                jsonschema.validate(json.loads(text), SCHEMA)
            case 1:
                assert re.fullmatch("[a-f]{3}-[0-9]{2,5}", text)
            case 2:
                assert text in ("north", "south by southwest", "no")
            case 3:
                assert re.fullmatch("(ab|cd)+[.]", text)
    assert checked >= 24


def test_logprobs_under_a_constraint_are_those_of_the_model(served: Served) -> None:
    def first_top(**constraint: Any) -> dict[int, float]:
        wanted = Sampling(max_tokens=1, temperature=0.0, logprobs=5, **constraint)
        events = served.inference.Generate(Request(model="roomy", text="The sky is", sampling=wanted))
        deltas = [event.delta for event in events if event.HasField("delta")]
        return {top.token_id: top.logprob for top in deltas[0].logprobs[0].top}

    free = first_top()
    bound = first_top(constraint={"choice": {"values": ["zebra", "quartz"]}})
    assert len(free.keys() & bound.keys()) >= 4, (free, bound)
    assert all(abs(free[token] - bound[token]) < 0.1 for token in free.keys() & bound.keys())


def test_adapters_share_a_step_with_the_base_model(served: Served) -> None:
    def asked(adapter: str, **sampling: Any) -> dict[str, Any]:
        text = "The three most important things in life are"
        return {"text": text, "options": Options(adapter=adapter), "sampling": {"max_tokens": 32, **sampling}}

    # By turns: bfloat16 sums in another order in a larger batch.
    base, still, loud = (
        served.run(**asked(name, temperature=0.0, ignore_eos=True))[0][0] for name in ("", "still", "loud")
    )
    assert base == still != loud
    before = served.counters("roomy")
    mixed = [asked(("", "still", "loud")[i % 3], temperature=0.8, seed=i + 1) for i in range(24)]
    assert all(len(answer[0][1]) > 0 for answer in served.together(mixed))
    served.until(lambda: served.counters("roomy")["rows"] >= before["rows"] + 24, 10)
    with pytest.raises(grpc.RpcError) as caught:
        served.run(**asked("unknown"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_preempted_streams_go_on_with_the_tokens_they_would_have_had(served: Served) -> None:
    """In float32, where a batch's size changes logits little; drawn hot, that shows in a token here and there at most.

    A token lost or drawn twice would move all that follow.
    """
    hot = {"temperature": 100.0, "allowed_token_ids": range(1000, 1500), "seed": 11}
    found = []
    for drawn in (hot, {"temperature": 0.0}):
        wanted = [
            {
                "model": "tight",
                "text": f"Story {i}: once upon a time",
                "sampling": {**drawn, "max_tokens": 160, "ignore_eos": True},
            }
            for i in range(12)
        ]
        before = served.load("tight").preemptions
        together = served.together(wanted)
        served.until(lambda before=before: served.load("tight").preemptions > before, 5)  # type: ignore[misc]
        before = served.load("tight").preemptions
        few = [answer for i in range(0, 12, 3) for answer in served.together(wanted[i : i + 3])]
        assert served.load("tight").preemptions == before
        pairs = [zip(a[0][1], b[0][1], strict=True) for a, b in zip(together, few, strict=True)]
        found.append([sum(x == y for x, y in pair) for pair in pairs])
    print(f"through preemption, tokens the same of 160: {found[0]} drawn, {found[1]} greedy")
    assert min(found[0]) >= 144
    assert sum(same == 160 for same in found[1]) >= 10
    served.until_idle(deployment="tight")


def test_a_prefix_is_found_again_under_its_salt_alone(served: Served) -> None:
    text = "A prompt long enough to fill some blocks, so that it is worth finding again. " * 12

    def cached(salt: str) -> int:
        request = Request(
            model="roomy", text=text, sampling=Sampling(max_tokens=2), options=Options(cache_salt=salt)
        )
        usage = list(served.inference.Generate(request))[-1].summary.usage
        assert usage.prompt_tokens > 160
        return int(usage.cached_prompt_tokens)

    mine, other = f"a{time.monotonic_ns()}", f"b{time.monotonic_ns()}"
    assert cached(mine) == 0
    assert cached(mine) >= 160
    assert cached(other) == 0


def _open(served: Served, count: int, timeout_s: float | None = None) -> list[Any]:
    wanted = Sampling(max_tokens=1900, ignore_eos=True)
    calls = [
        served.inference.Generate(
            Request(model="roomy", text=f"{i}: once", sampling=wanted), timeout=timeout_s
        )
        for i in range(count)
    ]
    for call in calls:
        assert next(call).HasField("started")
    return calls


def test_cancelled_streams_leave_the_engine(served: Served) -> None:
    calls = _open(served, 24)
    for call in calls:
        assert next(call).HasField("delta")
    assert served.load("roomy").running == 24
    begin = time.monotonic()
    for call in calls:
        call.cancel()
    served.until_idle(5, "roomy")
    print(f"24 cancelled streams left the engine within {1000 * (time.monotonic() - begin):.0f} ms")


def test_deadlines_end_streams_and_what_they_held(served: Served) -> None:
    begin = time.monotonic()
    for call in _open(served, 24, timeout_s=1.5):
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert time.monotonic() - begin < 5
    served.until_idle(5, "roomy")


def test_banned_strings_are_in_no_text(served: Served) -> None:
    words = ["the", "Once", " a", "\n", "ing"]
    drawn = {"temperature": 1.3, "n": 4, "max_tokens": 48, "ignore_eos": True, "bad_words": words}
    wanted = [
        {"sampling": {**drawn, "seed": i + 1} if i % 2 else {"max_tokens": 48, "seed": i + 1}}
        for i in range(12)
    ]
    for i, outputs in enumerate(served.together(wanted)):
        for text, _ in outputs.values():
            assert i % 2 == 0 or not any(word in text for word in words), text


def test_nothing_was_left_to_vllms_sampler_and_nothing_waited(served: Served) -> None:
    before = served.counters("roomy")["rows"]
    served.run({"max_tokens": 32, "ignore_eos": True})
    served.until(lambda: served.counters("roomy")["rows"] >= before + 32, 10)
    counters = served.counters("roomy")
    waited = {k for k, v in counters.items() if k.startswith(("stock_steps.", "device_waits.")) and v}
    assert not waited, counters
    assert counters["native_steps"] > 0
    assert counters["requests_admitted"] == 0  # adapters are stock's to admit
    assert served.counters("tight")["requests_admitted"] > 0


def test_kill_9_ends_streams_at_once_and_the_engines_come_back(servers: dict[str, Served]) -> None:
    """Both servers' engines, so that they start again at the same time."""
    calls = [call for served in servers.values() for call in _open(served, 8)]
    ended: list[tuple[float, grpc.StatusCode]] = []

    def drain(call: Any) -> None:
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        ended.append((time.monotonic(), caught.value.code()))

    threads = [threading.Thread(target=drain, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    killed_at = time.monotonic()
    for served in servers.values():
        below = descendants(served.process.pid)
        engines = [pid for pid, parent in below.items() if parent in below]
        assert len(engines) >= 2, below
        for pid in engines:
            os.kill(pid, signal.SIGKILL)
    for thread in threads:
        thread.join(30)
    assert [code for _, code in ended] == [grpc.StatusCode.UNAVAILABLE] * 16
    assert max(at for at, _ in ended) - killed_at < 3.0
    for served in servers.values():
        served.until(lambda served=served: served.status("roomy") == SERVING, 240)  # type: ignore[misc]
        assert len(served.run({"max_tokens": 8, "ignore_eos": True})[0][1]) == 8
        assert served.load("roomy").restarts == 1
