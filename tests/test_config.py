"""Settings from file, environment and flags; mistakes name the setting."""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from pydantic import BaseModel

from twinjet import config, environment
from twinjet.engines.supervisor import State
from twinjet.errors import ConfigError
from twinjet.server.main import Server
from twinjet.v1 import generation_pb2, service_pb2_grpc

MINIMAL = '[deployments.a]\nengine = "fake"\n'


def _load(
    tmp_path: Path, text: str, environ: dict[str, str] | None = None, **overrides: object
) -> config.Config:
    path = tmp_path / "twinjet.toml"
    path.write_text(text)
    return config.load(path, overrides, environ or {})


def test_flags_beat_the_environment_which_beats_the_file(tmp_path: Path) -> None:
    text = "[server]\nport = 1\nhost = 'file'\ngrace_s = 1\n" + MINIMAL
    environ = {"TWINJET_SERVER__PORT": "2", "TWINJET_SERVER__HOST": "environment"}
    loaded = _load(tmp_path, text, environ, server={"port": 3}).server
    assert (loaded.port, loaded.host, loaded.grace_s) == (3, "environment", 1)


def test_the_environment_reaches_every_depth(tmp_path: Path) -> None:
    environ = {"TWINJET_DEPLOYMENTS__A__OPTIONS__STEP_S": "0.5", "TWINJET_CACHE_DIR": "/elsewhere"}
    assert _load(tmp_path, MINIMAL, environ).deployments["a"].options == {"step_s": 0.5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[server]\nprot = 1\n" + MINIMAL, "unknown setting server.prot; did you mean 'port'?"),
        ("[sever]\n" + MINIMAL, "unknown setting sever; did you mean 'server'?"),
        (MINIMAL + "modle = 'x'\n", "unknown setting deployments.a.modle; did you mean 'model'?"),
        ("[server]\nport = 99999\n" + MINIMAL, "server.port: "),
        ("[deployments.a]\nengine = 'gpt'\n", "deployments.a.engine: "),
        ("", "no deployment is configured"),
        (MINIMAL + "[routes.m]\nweights = { b = 1 }\n", "names deployment 'b', which does not exist"),
        ("[server]\ntls_cert = 'x'\n" + MINIMAL, "tls_cert and tls_key belong together"),
        ("[server\n", "is not valid TOML"),
        ("server = 5\n" + MINIMAL, "server: must be a table"),
        ("[server]\nhost = '127.0.0.1:50051'\n" + MINIMAL, "server.host: '127.0.0.1:50051' has a port in it"),
        ("[server]\nhost = ''\n" + MINIMAL, "0.0.0.0 or :: listens on all interfaces"),
        ("[server]\nhost = 'a b'\n" + MINIMAL, "neither an address nor a host name"),
        ("[server]\nport = 7\nmetrics_port = 7\n" + MINIMAL, "port and metrics_port are both 7"),
        ("[server]\ngrace_s = inf\n" + MINIMAL, "server.grace_s: inf is refused: it should be less than"),
        ("[server]\nkeepalive_s = nan\n" + MINIMAL, "server.keepalive_s: nan is refused"),
        ("[server]\nmax_request_bytes = 2147483648\n" + MINIMAL, "server.max_request_bytes: 2147483648 is"),
        ("[admin]\ntoken = 'naïve'\n" + MINIMAL, "admin.token: has other than printable ASCII"),
        ('[server]\ntls_cert = "a\\u0000"\n' + MINIMAL, "server.tls_cert: has a null character"),
        (MINIMAL + "scheduler = { max_running = 1e400 }\n", "deployments.a.scheduler.max_running: "),
        (MINIMAL + "scheduler = { polisy = 'fair' }\n", "did you mean 'policy'?"),
        (MINIMAL + "scheduler = { tenants = { t = { wieght = 1 } } }\n", "did you mean 'weight'?"),
        ('[deployments.""]\nengine = "fake"\n', "cannot be a name"),
        (MINIMAL + "[routes.m]\nweights = { a = inf }\n", "routes.m.weights.a: inf is refused"),
        ("a = " + "[" * 100_000, "nested too deep"),
        ("a = " + "1" * 5_000, "cannot be read"),
    ],
)
def test_a_mistake_names_the_setting(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _load(tmp_path, text)
    assert message in str(caught.value)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        config.load(tmp_path / "none.toml", {}, {})


def test_a_file_that_is_not_utf_8_is_told_and_a_byte_order_mark_is_not_minded(tmp_path: Path) -> None:
    path = tmp_path / "twinjet.toml"
    path.write_bytes("[admin]\ntoken = 'é'\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="is not UTF-8: byte 0xe9 at offset 17"):
        config.load(path, {}, {})
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert config.load(path, {}, {}).deployments


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (
            {"TWINJET_SERVER_PORT": "1"},
            "unknown variable TWINJET_SERVER_PORT; did you mean TWINJET_SERVER__PORT?",
        ),
        ({"TWINJET_SERVER__PROT": "1"}, "unknown variable TWINJET_SERVER__PROT; did you mean 'port'?"),
        ({"TWINJET_SEVER__PORT": "1"}, "did you mean 'server'?"),
        ({"TWINJET_CACHEDIR": "/x"}, "did you mean 'TWINJET_CACHE_DIR'?"),
        ({"TWINJET_": "1"}, "unknown variable TWINJET_"),
        ({"TWINJET_SERVER____PORT": "1"}, "unknown variable"),
        ({"TWINJET_SERVER__PORT__X": "1"}, "unknown variable"),
        ({"TWINJET_DEPLOYMENTS__A__MODLE": "x"}, "did you mean 'model'?"),
        (
            {"TWINJET_DEPLOYMENTS__A__OPTIONS": "5", "TWINJET_DEPLOYMENTS__A__OPTIONS__X": "1"},
            "TWINJET_DEPLOYMENTS__A__OPTIONS__X sets deployments.a.options.x, but "
            "TWINJET_DEPLOYMENTS__A__OPTIONS makes deployments.a.options a value",
        ),
        ({"TWINJET_SERVER": "5", "TWINJET_SERVER__PORT": "1"}, "TWINJET_SERVER makes server a value"),
        (
            {"TWINJET_SERVER__Port": "1", "TWINJET_SERVER__PORT": "2"},
            "TWINJET_SERVER__PORT and TWINJET_SERVER__Port set the same, server.port",
        ),
        ({"TWINJET_SERVER__PORT": "many"}, "server.port (from TWINJET_SERVER__PORT): 'many' is refused"),
        ({"TWINJET_SERVER__PORT": "1\nother = 2"}, "server.port (from TWINJET_SERVER__PORT)"),
        ({"TWINJET_SERVER__HOST": "\udce9"}, "TWINJET_SERVER__HOST is not UTF-8"),
        ({"TWINJET_DEPLOYMENTS__A__OPTIONS__X": "\udce9"}, "is not UTF-8"),
        ({"TWINJET_SERVER__PORT": "[" * 100_000}, "server.port"),
    ],
)
def test_a_wrong_variable_is_named(tmp_path: Path, environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _load(tmp_path, MINIMAL, environ)
    assert message in str(caught.value)


def test_a_file_that_a_variable_contradicts_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the configuration file makes server a value, not a table"):
        _load(tmp_path, "server = 5\n" + MINIMAL, {"TWINJET_SERVER__PORT": "1"})


def test_text_from_the_environment_is_taken_as_it_stands(tmp_path: Path) -> None:
    environ = {
        "TWINJET_ADMIN__TOKEN": "12345",
        "TWINJET_DEPLOYMENTS__A__MODEL": "2026",
        "TWINJET_SERVER__ALLOW_PARTIAL": "yes",
        "TWINJET_SERVER__TLS_CERT": "true",
        "TWINJET_SERVER__TLS_KEY": "7",
    }
    loaded = _load(tmp_path, MINIMAL, environ)
    assert (loaded.admin.token, loaded.deployments["a"].model) == ("12345", "2026")
    assert loaded.server.allow_partial
    assert (loaded.server.tls_cert, loaded.server.tls_key) == (Path("true"), Path("7"))


def test_a_variable_reaches_names_as_the_file_spells_them(tmp_path: Path) -> None:
    text = '[deployments."Llama-3.1"]\nengine = "fake"\n'
    loaded = _load(tmp_path, text, {"TWINJET_DEPLOYMENTS__LLAMA_3_1__STALL_S": "7"})
    assert {name: d.stall_s for name, d in loaded.deployments.items()} == {"Llama-3.1": 7}


def test_a_whole_section_may_come_as_one_variable(tmp_path: Path) -> None:
    environ = {"TWINJET_SERVER": "{ port = 1, grace_s = 2 }", "TWINJET_SERVER__PORT": "3"}
    loaded = _load(tmp_path, MINIMAL, environ).server
    assert (loaded.port, loaded.grace_s) == (3, 2)


def test_variables_of_others_are_let_alone(tmp_path: Path) -> None:
    """Those that Kubernetes sets for services named twinjet and twinjet-server, and our own."""
    environ = {
        "TWINJET_SERVICE_HOST": "10.0.0.1",
        "TWINJET_SERVICE_PORT": "50051",
        "TWINJET_SERVICE_PORT_GRPC": "50051",
        "TWINJET_PORT": "tcp://10.0.0.1:50051",
        "TWINJET_PORT_50051_TCP": "tcp://10.0.0.1:50051",
        "TWINJET_PORT_50051_TCP_ADDR": "10.0.0.1",
        "TWINJET_PORT_50051_TCP_PORT": "50051",
        "TWINJET_PORT_50051_TCP_PROTO": "tcp",
        "TWINJET_SERVER_SERVICE_HOST": "10.0.0.1",
        "TWINJET_SERVER_PORT": "tcp://10.0.0.1:50051",
        "TWINJET_TOKEN": "x",
        "TWINJET_CPU_TARGET": "scalar",
    }
    assert _load(tmp_path, MINIMAL, environ).server.port == 50051


def test_every_variable_that_is_read_anywhere_is_known() -> None:
    read: set[str] = set()
    for path in [*Path("python/twinjet").rglob("*.py"), *Path("csrc").rglob("*.c*")]:
        text = path.read_text()
        read |= set(re.findall(r'(?:environ(?:\.get)?[(\[]|getenv\()"(TWINJET_\w+)"', text))
        read |= set(re.findall(r'^\w*ENV\w* = "(TWINJET_\w+)"', text, re.MULTILINE))
    assert {"TWINJET_TOKEN", "TWINJET_CPU_TARGET", "TWINJET_VLLM_NATIVE"} <= read
    assert read <= environment.OTHER_VARIABLES


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_an_ipv6_address_may_have_brackets(tmp_path: Path, host: str) -> None:
    server = _load(tmp_path, f"[server]\nhost = '{host}'\n" + MINIMAL).server
    assert (server.host, server.literal_host) == ("::1", "[::1]")


def _numbers(model: type[BaseModel], path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        if field.annotation in (int, float):
            yield (*path, name)
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _numbers(field.annotation, (*path, name))


NUMBERS = [
    *_numbers(config.Config, ()),
    *_numbers(config.DeploymentSettings, ("deployments", "a")),
]
EXTREMES = [
    -1, 0, 1, 2**31 - 1, 2**31, 2**53, 2**63, 2**64, 10**400,
    -math.inf, 5e-324, 0.0004, 0.5, 1e6, 1e308, math.inf, math.nan,
]  # fmt: skip


@pytest.mark.parametrize("door", ["grpc", "auto"])
@pytest.mark.parametrize("path", NUMBERS, ids=".".join)
async def test_each_number_is_refused_or_can_be_served_with(path: tuple[str, ...], door: str) -> None:
    """Every extreme value ends in a ConfigError that names the setting, or in a server that answers."""
    taken = 0
    for value in EXTREMES:
        tree: dict[str, Any] = {"server": {"port": 0, "door": door}, "deployments": {"a": {"engine": "fake"}}}
        at = tree
        for key in path[:-1]:
            at = at.setdefault(key, {})
        at[path[-1]] = value
        try:
            loaded = config.load(None, tree, {})
        except ConfigError as error:
            assert ".".join(path) in str(error)
            continue
        if path[-1].endswith("port") and value:
            continue
        taken += 1
        server = Server(loaded)
        await server.start()
        try:
            supervisor = server.deployments.by_name["a"].supervisor
            async with asyncio.timeout(10), grpc.aio.insecure_channel(server.address) as channel:
                while supervisor.state is not State.READY:
                    assert supervisor.state is not State.FAILED
                    await asyncio.sleep(0.002)
                request = generation_pb2.GenerateRequest(token_ids=[1], sampling={"max_tokens": 2})
                call = service_pb2_grpc.InferenceServiceStub(channel).Generate(request, timeout=5)
                with contextlib.suppress(grpc.aio.AioRpcError):
                    async for _ in call:
                        pass
                assert await call.code() in (grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED)
        finally:
            await server.drain(0.0)
            await server.stop()
    assert taken or path[-1].endswith("port")


def test_without_routes_each_deployment_is_public_under_its_name(tmp_path: Path) -> None:
    assert list(_load(tmp_path, MINIMAL).public_routes()) == ["a"]
    routed = _load(tmp_path, MINIMAL + "[routes.m]\nweights = { a = 1 }\n")
    assert list(routed.public_routes()) == ["m"]


@pytest.mark.parametrize("path", sorted(Path("deploy/examples").glob("*.toml")), ids=lambda p: p.name)
def test_the_examples_load(path: Path) -> None:
    assert config.load(path, {}, {}).deployments


def test_the_documentation_names_every_setting() -> None:
    text = Path("docs/configuration.md").read_text()
    for section in (
        config.ServerSettings,
        config.AdminSettings,
        config.DeploymentSettings,
        config.RouteSettings,
        config.MirrorSettings,
        config.OpenEngineSettings,
    ):
        for name in section.model_fields:
            assert f"`{name}`" in text, name
