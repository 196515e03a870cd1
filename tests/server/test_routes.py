"""Routes and deployments changed while requests run, and mirrored requests."""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import ParseDict
from google.protobuf.struct_pb2 import Struct
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.server.harness import Harness, Serve, collect, details
from twinjet import config
from twinjet.cli import main
from twinjet.config import Config
from twinjet.v1 import generation_pb2, routing_pb2, sampling_pb2

FAKE = {"engine": "fake"}
TWO = {"a": FAKE, "b": FAKE}


def _request(text: str = "x", max_tokens: int = 2, **options: Any) -> generation_pb2.GenerateRequest:
    return generation_pb2.GenerateRequest(
        model="m",
        text=text,
        sampling=sampling_pb2.SamplingParams(max_tokens=max_tokens),
        options=generation_pb2.RequestOptions(**options),
    )


async def _served_by(h: Harness, count: int, **options: Any) -> Counter[str]:
    async def one() -> str:
        messages = await collect(h.inference.Generate(_request(**options)))
        return messages[0].started.deployment

    return Counter(await asyncio.gather(*(one() for _ in range(count))))


async def _fails(call: Any) -> tuple[grpc.StatusCode, dict[str, Any]]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), details(caught.value)


def _add(name: str, *, public: bool = False, **settings: Any) -> routing_pb2.AddDeploymentRequest:
    return routing_pb2.AddDeploymentRequest(
        name=name, settings=ParseDict({"engine": "fake"} | settings, Struct()), public=public
    )


def _records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(folder.iterdir()) for line in path.read_text().splitlines()]


async def test_weights_changed_under_load_drop_no_stream(serve: Serve) -> None:
    h = await serve(
        deployments={n: FAKE | {"options": {"step_s": 0.002}} for n in "ab"},
        routes={"m": {"weights": {"a": 1.0}}},
    )
    calls = [h.inference.Generate(_request(max_tokens=60)) for _ in range(40)]
    # Having begun is what cannot be missed; that a stream is open can.
    begun = [await call.read() for call in calls[:10]]
    running = asyncio.gather(*map(collect, calls))
    await h.admin.SetRoute(
        routing_pb2.SetRouteRequest(route=routing_pb2.Route(model="m", weights={"b": 1.0}))
    )
    assert await _served_by(h, 20) == {"b": 20}
    assert {message.started.deployment for message in begun} == {"a"}
    for messages in await running:
        assert messages[-1].WhichOneof("event") == "summary"
        assert messages[-1].summary.usage.output_tokens == 60


async def test_the_split_follows_the_weights_and_a_share_is_mirrored(serve: Serve, tmp_path: Path) -> None:
    h = await serve(
        deployments=TWO | {"c": FAKE},
        routes={"m": {"weights": {"a": 70, "b": 30}, "mirror": "c", "mirror_share": 0.1}},
        mirror={"folder": tmp_path, "max_streams": 1000},
    )
    # Drawn anew each time, one run in a hundred would leave three standard errors.
    h.server.deployments._random.seed(1)
    counts: Counter[str] = Counter()
    for _ in range(10):
        counts += await _served_by(h, 50)
    await h.until(lambda: not h.server.mirror._tasks)
    assert abs(counts["a"] - 350) <= 3 * (500 * 0.7 * 0.3) ** 0.5
    copied, dropped = h.server.mirror.counts["copied"], h.server.mirror.counts["dropped"]
    assert abs(copied + dropped - 50) <= 3 * (500 * 0.1 * 0.9) ** 0.5
    records = _records(tmp_path)
    assert len(records) == copied
    assert {r["deployment"] for r in records} == {"c"} and {r["error"] for r in records} == {""}
    assert all(r["outputs"][0]["tokens"] == 2 for r in records)
    assert all("prompt_token_ids" not in r and "text" not in r["outputs"][0] for r in records)


async def test_a_stuck_mirror_costs_the_primary_nothing_and_is_bounded(serve: Serve) -> None:
    h = await _with_stuck_mirror(serve)
    assert await _served_by(h, 40) == {"a": 40}
    assert h.server.mirror.counts["copied"] == 3 and h.server.mirror.counts["dropped"] == 37


async def _with_stuck_mirror(serve: Serve) -> Harness:
    h = await serve(
        deployments=TWO,
        routes={"m": {"weights": {"a": 1}, "mirror": "b", "mirror_share": 1.0}},
        mirror={"max_streams": 3},
    )
    stuck = h.engines[1]

    async def never(step_s: float) -> None:
        await asyncio.Event().wait()

    stuck._pause = never  # type: ignore[attr-defined]
    return h


async def test_what_is_recorded_of_prompts_is_asked_for(serve: Serve, tmp_path: Path) -> None:
    h = await serve(
        deployments=TWO,
        routes={"m": {"weights": {"a": 1}, "mirror": "b", "mirror_share": 1.0}},
        mirror={"folder": tmp_path, "record_prompts": True},
    )
    messages = await collect(h.inference.Generate(_request("hello", 4, request_id="r1")))
    await h.until(lambda: not h.server.mirror._tasks)
    (record,) = _records(tmp_path)
    assert record["request_id"] == "r1" and record["prompt_token_ids"][1:] == list(b"hello")
    sent = [t for m in messages for t in m.delta.token_ids]
    # The copy has the seed of the original, so two equal deployments say the same.
    assert record["outputs"][0]["token_ids"] == sent


async def test_a_tenant_stays_and_a_session_stays(serve: Serve) -> None:
    for kind in ("tenant", "session"):
        h = await serve(deployments=TWO, routes={"m": {"weights": {"a": 1, "b": 1}, "sticky": kind}})
        for key in ("k1", "k2", "k3", "k4", "k5", "k6"):
            assert len(await _served_by(h, 8, **{kind: key})) == 1
        spread = Counter()
        for key in range(24):
            spread += await _served_by(h, 1, **{kind: f"key{key}"})
        assert set(spread) == {"a", "b"}


async def test_routes_are_read_and_written_with_a_revision(serve: Serve) -> None:
    h = await serve(deployments=TWO, routes={"m": {"weights": {"a": 1}, "fallback": ["b"]}})
    read = await h.admin.GetRoutes(routing_pb2.GetRoutesRequest())
    assert (read.revision, list(read.deployments)) == (1, ["a", "b"])
    (route,) = read.routes
    assert (route.model, dict(route.weights), list(route.fallback)) == ("m", {"a": 1.0}, ["b"])
    del route.fallback[:]
    route.weights["b"] = 0.5
    done = await h.admin.SetRoute(routing_pb2.SetRouteRequest(route=route, revision=1))
    assert done.revision == 2
    code, found = await _fails(h.admin.SetRoute(routing_pb2.SetRouteRequest(route=route, revision=1)))
    assert code is grpc.StatusCode.ABORTED
    assert found["ErrorInfo"].reason == "REVISION_CHANGED"
    assert found["ErrorInfo"].metadata["revision"] == "2"


@pytest.mark.parametrize(
    ("route", "field"),
    [
        ({"model": "m", "weights": {"a": -1.0, "b": 1.0}}, "route.weights[a]"),
        ({"model": "m", "weights": {"a": 0.0}}, "route.weights"),
        ({"model": "m", "weights": {"z": 1.0}}, "route.weights"),
        ({"model": "m", "weights": {"a": 1.0}, "fallback": ["b", "b"]}, "route.fallback"),
        (
            {"model": "m", "weights": {"a": 1.0}, "mirror": {"deployment": "b", "share": 2.0}},
            "route.mirror.share",
        ),
        ({"model": "", "weights": {"a": 1.0}}, "route.model"),
        ({"model": "a b", "weights": {"a": 1.0}}, "route.model"),
        ({"model": "m", "weights": {"a": 1.0}, "sticky": 9}, "route.sticky"),
    ],
)
async def test_a_wrong_route_is_refused_whole(serve: Serve, route: dict[str, Any], field: str) -> None:
    h = await serve(deployments=TWO, routes={"m": {"weights": {"a": 1}}})
    message = ParseDict(route, routing_pb2.Route())
    code, found = await _fails(h.admin.SetRoute(routing_pb2.SetRouteRequest(route=message)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert [v.field for v in found["BadRequest"].field_violations] == [field]
    assert (await h.admin.GetRoutes(routing_pb2.GetRoutesRequest())).revision == 1


async def test_the_last_route_stays_and_a_removed_one_is_not_found(serve: Serve) -> None:
    h = await serve(deployments=TWO, routes={"m": {"weights": {"a": 1}}, "n": {"weights": {"b": 1}}})
    watch = health_pb2_grpc.HealthStub(h.channel).Watch(health_pb2.HealthCheckRequest(service="m"))
    while (await watch.read()).status != health_pb2.HealthCheckResponse.SERVING:
        pass
    remove = routing_pb2.SetRouteRequest(route=routing_pb2.Route(model="m"), remove=True)
    await h.admin.SetRoute(remove)
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    code, _ = await _fails(collect(h.inference.Generate(_request())))
    assert code is grpc.StatusCode.NOT_FOUND
    assert (await _fails(h.admin.SetRoute(remove)))[0] is grpc.StatusCode.NOT_FOUND
    last = routing_pb2.SetRouteRequest(route=routing_pb2.Route(model="n"), remove=True)
    code, found = await _fails(h.admin.SetRoute(last))
    assert (code, found["ErrorInfo"].reason) == (grpc.StatusCode.FAILED_PRECONDITION, "LAST_ROUTE")


async def test_a_deployment_comes_serves_and_goes(serve: Serve) -> None:
    h = await serve(deployments={"a": FAKE}, routes={"m": {"weights": {"a": 1}}})
    await h.admin.AddDeployment(_add("b", public=True, options={"output_tokens": 3}))
    names = await h.admin.GetRoutes(routing_pb2.GetRoutesRequest())
    assert list(names.deployments) == ["a", "b"] and [r.model for r in names.routes] == ["b", "m"]
    answer = await collect(h.inference.Generate(generation_pb2.GenerateRequest(model="b", text="x")))
    assert answer[-1].summary.usage.output_tokens == 4
    code, _ = await _fails(h.admin.AddDeployment(_add("b")))
    assert code is grpc.StatusCode.ALREADY_EXISTS
    remove = routing_pb2.RemoveDeploymentRequest(name="b")
    code, found = await _fails(h.admin.RemoveDeployment(remove))
    assert (code, found["ErrorInfo"].reason) == (grpc.StatusCode.FAILED_PRECONDITION, "DEPLOYMENT_IN_USE")
    await h.admin.SetRoute(routing_pb2.SetRouteRequest(route=routing_pb2.Route(model="b"), remove=True))
    await h.admin.RemoveDeployment(remove)
    assert (await _fails(h.admin.RemoveDeployment(remove)))[0] is grpc.StatusCode.NOT_FOUND


async def test_removal_waits_for_what_runs_and_ends_the_rest(serve: Serve) -> None:
    h = await serve(
        deployments={n: FAKE | {"options": {"step_s": 0.005}} for n in "ab"},
        routes={"m": {"weights": {"b": 1}}},
    )
    short = asyncio.create_task(collect(h.inference.Generate(_request(max_tokens=20))))
    endless: list[generation_pb2.GenerateResponse] = []
    long = asyncio.create_task(collect(h.inference.Generate(_request(max_tokens=4000)), endless))
    await h.until(lambda: len(h.server.deployments.by_name["b"].dispatcher.load().request_ids) == 2)
    await h.admin.SetRoute(
        routing_pb2.SetRouteRequest(route=routing_pb2.Route(model="m", weights={"a": 1.0}))
    )
    remove = routing_pb2.RemoveDeploymentRequest(name="b")
    remove.grace.FromMilliseconds(1500)
    done = await h.admin.RemoveDeployment(remove)
    assert (done.finished, done.ended) == (1, 1)
    assert (await short)[-1].summary.usage.output_tokens == 20
    code, found = await _fails(long)
    assert (code, found["ErrorInfo"].reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")


@pytest.mark.parametrize(
    ("settings", "code", "told"),
    [
        ({"engine": "nothing"}, grpc.StatusCode.INVALID_ARGUMENT, "engine"),
        ({"colour": "red"}, grpc.StatusCode.INVALID_ARGUMENT, "colour"),
        ({"options": {"fail_start": "too little memory: 80 GiB needed, 24 there"}},
         grpc.StatusCode.FAILED_PRECONDITION, "too little memory"),
        ({"options": {"die_at_start": 1}}, grpc.StatusCode.FAILED_PRECONDITION, "told to die at start"),
        ({"options": {"max_num_seqs": 2.5}}, grpc.StatusCode.FAILED_PRECONDITION, "max_num_seqs"),
    ],
)  # fmt: skip
async def test_a_deployment_that_cannot_start_leaves_nothing(
    serve: Serve, settings: dict[str, Any], code: grpc.StatusCode, told: str
) -> None:
    h = await serve(deployments={"a": FAKE})
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await h.admin.AddDeployment(_add(f"new{told[:3].strip()}", public=True, **settings))
    assert caught.value.code() is code and told in (caught.value.details() or "")
    assert list(h.server.deployments.by_name) == ["a"] and h.server.deployments.models == ["a"]
    assert len(await _only(h)) > 0


@pytest.mark.parametrize("number", [math.inf, math.nan])
async def test_settings_with_a_number_that_json_lacks_are_refused(serve: Serve, number: float) -> None:
    h = await serve(deployments={"a": FAKE})
    request = _add("new")
    request.settings.update({"options": {"step_s": number}})
    code, found = await _fails(h.admin.AddDeployment(request))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert found["BadRequest"].field_violations[0].field == "settings"


async def _only(h: Harness) -> list[generation_pb2.GenerateResponse]:
    return await collect(h.inference.Generate(_request_without_model()))


def _request_without_model() -> generation_pb2.GenerateRequest:
    return generation_pb2.GenerateRequest(text="x", sampling=sampling_pb2.SamplingParams(max_tokens=1))


async def test_an_operator_who_hangs_up_leaves_nothing(serve: Serve) -> None:
    h = await serve(deployments={"a": FAKE})
    call = h.admin.AddDeployment(_add("slow", options={"load_s": 60}))
    await h.until(lambda: "slow" in h.server.deployments.by_name)
    call.cancel()
    await h.until(lambda: "slow" not in h.server.deployments.by_name)


async def test_a_deployment_that_is_being_added_has_no_routes_and_is_not_removed(serve: Serve) -> None:
    h = await serve(deployments={"a": FAKE})
    adding = h.admin.AddDeployment(_add("slow", options={"load_s": 60}))
    await h.until(lambda: "slow" in h.server.deployments.by_name)
    route = routing_pb2.Route(model="m", weights={"a": 1.0}, fallback=["slow"])
    code, found = await _fails(h.admin.SetRoute(routing_pb2.SetRouteRequest(route=route)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert found["BadRequest"].field_violations[0].field == "route.fallback"
    code, found = await _fails(h.admin.RemoveDeployment(routing_pb2.RemoveDeploymentRequest(name="slow")))
    assert (code, found["ErrorInfo"].reason) == (grpc.StatusCode.FAILED_PRECONDITION, "DEPLOYMENT_STARTING")
    adding.cancel()
    await h.until(lambda: "slow" not in h.server.deployments.by_name)
    await h.admin.AddDeployment(_add("slow", public=True))
    await h.admin.SetRoute(routing_pb2.SetRouteRequest(route=route))


async def test_a_killed_deployment_hands_over_to_the_other(serve: Serve) -> None:
    h = await serve(deployments=TWO, routes={"m": {"weights": {"a": 1}, "fallback": ["b"]}})
    assert await _served_by(h, 5) == {"a": 5}
    h.engines[0].die()  # type: ignore[attr-defined]
    await h.until(lambda: not h.server.deployments.by_name["a"].is_ready)
    assert await _served_by(h, 5) == {"b": 5}


def _config(h: Harness, **changes: Any) -> Config:
    tree = h.server.config.model_dump()
    return Config.model_validate(tree | changes)


async def test_a_reloaded_file_is_taken_whole(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="twinjet.server")
    h = await serve(deployments=TWO, routes={"m": {"weights": {"a": 1}}})
    new = _config(
        h, deployments={"b": FAKE, "c": FAKE}, routes={"m": {"weights": {"c": 1}}, "n": {"weights": {"b": 1}}}
    )
    await h.server.reload(lambda: new)
    assert sorted(h.server.deployments.by_name) == ["b", "c"] and h.server.deployments.models == ["m", "n"]
    assert await _served_by(h, 3) == {"c": 3}
    assert "deployment a removed: 0 requests finished, 0 ended" in caplog.text
    assert "deployment c added" in caplog.text and "route n set" in caplog.text


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"deployments": {"a": FAKE | {"options": {"step_s": 1.0}}, "b": FAKE}}, "the settings of a changed"),
        ({"deployments": TWO | {"c": FAKE | {"options": {"fail_start": "no memory"}}}}, "no memory"),
        ({"server": {"port": 0, "grace_s": 3.0}}, "[server] changed; that needs a restart"),
    ],
)
async def test_a_file_that_cannot_be_had_whole_changes_nothing(
    serve: Serve, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], told: str
) -> None:
    h = await serve(deployments=TWO, routes={"m": {"weights": {"a": 1}}})
    new = _config(h, **changes | {"routes": {"m": {"weights": {"b": 1}}}})
    await h.server.reload(lambda: new)
    assert told in caplog.text and "nothing has changed" in caplog.text
    assert sorted(h.server.deployments.by_name) == ["a", "b"]
    assert await _served_by(h, 3) == {"a": 3}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"[deployments.a\n", "twinjet.toml"),
        (b"\xff\xfe[deployments.a]", "twinjet.toml"),
        (None, "twinjet.toml"),
        (b'[deployments.a]\nengine = "fake"\ncolour = "red"\n', "colour"),
        (b'[deployments.a]\nengine = "fake"\n[routes.m]\nweights = { a = -1 }\n', "routes.m.weights.a"),
        (b'[deployments.a]\nengine = "fake"\n[routes.m]\nweights = { a = 0 }\n', "above 0"),
        (b'[deployments.a]\nengine = "fake"\n[routes.m]\nweights = { z = 1 }\n', "'z'"),
        (
            b'[deployments.a]\nengine = "fake"\n[routes.m]\nweights = {a = 1}\nfallback = ["a", "a"]\n',
            "twice",
        ),
    ],
    ids=["cut", "no text", "gone", "unknown key", "negative", "all zero", "unknown deployment", "cycle"],
)
async def test_a_broken_file_changes_nothing(
    serve: Serve, caplog: pytest.LogCaptureFixture, tmp_path: Path, content: bytes | None, told: str
) -> None:
    h = await serve(deployments=TWO, routes={"m": {"weights": {"a": 1}}})
    path = tmp_path / "twinjet.toml"
    if content is not None:
        path.write_bytes(content)
    await h.server.reload(lambda: config.load(path))
    assert told in caplog.text and "nothing has changed" in caplog.text
    assert sorted(h.server.deployments.by_name) == ["a", "b"]
    assert await _served_by(h, 3) == {"a": 3}


async def test_routes_are_the_operators(serve: Serve) -> None:
    h = await serve(admin={"token": "secret"})
    for call in (
        h.admin.GetRoutes(routing_pb2.GetRoutesRequest()),
        h.admin.SetRoute(routing_pb2.SetRouteRequest()),
        h.admin.AddDeployment(_add("x")),
        h.admin.RemoveDeployment(routing_pb2.RemoveDeploymentRequest(name="fake")),
    ):
        assert (await _fails(call))[0] is grpc.StatusCode.PERMISSION_DENIED


async def test_the_command_shows_and_sets_routes(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    h = await serve(deployments=TWO, routes={"m": {"weights": {"a": 1}}})

    async def twinjet(*flags: str) -> int:
        return await asyncio.to_thread(main, ["routes", "--address", h.server.address, *flags])

    assert (
        await twinjet(
            "--set", "m", "--weight", "a=9", "--weight", "b=1", "--fallback", "b", "--sticky", "tenant"
        )
        == 0
    )
    out, err = capsys.readouterr()
    assert out.splitlines()[1].split() == ["m", "a=9", "b=1", "b", "tenant", "-"]
    assert "revision 2; deployments: a, b" in err
    assert await twinjet("--set", "m", "--weight", "z=1") == 1
    assert "route.weights" in capsys.readouterr().err
    assert await twinjet("--set", "m", "--weight", "a", "--revision", "2") == 2
    assert await twinjet("--set", "n", "--weight", "a=1", "--revision", "1") == 1
    assert "revision 2, not 1" in capsys.readouterr().err
    assert await twinjet("--set", "n", "--weight", "a=1", "--mirror", "b=0.5", "--json") == 0
    assert json.loads(capsys.readouterr().out)["routes"][1]["mirror"] == {"deployment": "b", "share": 0.5}
    assert await twinjet("--remove", "n") == 0
