"""The command line, as processes and through main(), against a scripted server on a real socket."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from grpc import StatusCode

from tests.client.scripted import Fails, Scripted, Stalls, delta, running, started, whole
from twinjet.cli import main, serve_overrides
from twinjet.config import Config
from twinjet.errors import ConfigError
from twinjet.server.console import grpcurl_command


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripted]:
    with running() as scripted:
        monkeypatch.setenv("TWINJET_ADDRESS", scripted.address)
        yield scripted


def test_generate_streams_text_and_sends_what_the_flags_say(
    server: Scripted, capsys: pytest.CaptureFixture[str]
) -> None:
    server.scripts = [whole("he", "llo")]
    flags = "--temperature 0 --top-k 0 --seed 5 --max-tokens 9 --stop a --stop b --regex x+ --model m --stats"
    assert main(["generate", "once", *flags.split()]) == 0
    out, err = capsys.readouterr()
    assert out == "hello\n"
    assert "3 + 2 tokens" in err
    sent = server.requests[-1]
    assert (sent.text, sent.model, sent.sampling.seed, sent.sampling.max_tokens) == ("once", "m", 5, 9)
    assert sent.sampling.HasField("temperature")
    assert sent.sampling.HasField("top_k")
    assert not sent.sampling.HasField("top_p")
    assert list(sent.sampling.stop) == ["a", "b"]
    assert sent.sampling.constraint.regex == "x+"


def test_json_gives_one_event_a_line(server: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "hi", "--system", "be brief", "--json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [e["event"] for e in events] == ["started", "delta", "finished", "summary"]
    assert events[1]["text"] == "hello"
    assert [(m.role, m.content) for m in server.requests[-1].messages] == [
        ("system", "be brief"),
        ("user", "hi"),
    ]


def test_models_load_and_tokenize(server: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    def output(*arguments: str) -> str:
        assert main([*arguments]) == 0
        return capsys.readouterr().out

    server.scripts = [[]]
    assert output("models").splitlines()[1].split()[:2] == ["m", "ready"]
    assert json.loads(output("models", "--json")) == [{"name": "m", "state": "MODEL_STATE_READY"}]
    assert output("load").splitlines()[1].split() == ["m", "0", "3", "-", "-", "-", "-", "-"]
    assert json.loads(output("load", "--json")) == [{"model": "m", "waiting": 0, "running": 3}]
    assert output("tokenize", "ab") == "1 2\n"
    assert json.loads(output("tokenize", "ab", "--json"))["token_ids"] == [1, 2]


def test_a_refusal_names_each_field_and_exits_with_1(
    server: Scripted, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {"sampling.top_p": "7 is out of range"}
    server.scripts = [[Fails(StatusCode.INVALID_ARGUMENT, reason="INVALID", violations=bad)]]
    assert main(["generate", "x"]) == 1
    assert capsys.readouterr().err == "error: invalid argument\n  sampling.top_p: 7 is out of range\n"
    assert main(["generate", "x", "--json"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert json.loads(err)["error"]["violations"] == [
        {"field": "sampling.top_p", "message": "7 is out of range"}
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate"],
        ["nonsense"],
        ["generate", "x", "--max-tokens", "many"],
        ["generate", "x", "--regex", "a", "--ebnf", "b"],
        ["serve", "--engine", "unknown"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_wrong_settings_exit_with_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["serve", "--config", str(tmp_path / "none.toml")]) == 2
    assert "cannot read" in capsys.readouterr().err
    assert main(["models", "--ca", str(tmp_path / "none.pem")]) == 2
    assert main(["chat", "--json"]) == 2


def run_cli(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "twinjet.cli", *arguments], **options)


def test_a_reader_that_leaves_is_no_traceback(server: Scripted) -> None:
    server.scripts = [[started(), *(delta("x" * 1000) for _ in range(500)), *whole("")[1:]]]
    with run_cli("generate", "x", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.read(1) == b"x"
        child.stdout.close()
        assert b"Traceback" not in child.stderr.read()
        assert child.wait(10) == 1


def test_an_interactive_chat_reads_turns_from_a_pipe(server: Scripted) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "twinjet.cli", "chat"],
        input="first\n\nsecond\n",
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stdout == "hello\nhello\n"
    assert [m.content for m in server.requests[-1].messages] == ["first", "hello", "second"]


class Terminal:
    """A pseudo-terminal with `twinjet chat` in it."""

    def __init__(self, *arguments: str) -> None:
        self.controller, terminal = pty.openpty()
        self.child = run_cli(
            "chat", *arguments, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True
        )
        os.close(terminal)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self.controller, text.encode())

    def interrupt(self) -> None:
        self.child.send_signal(signal.SIGINT)

    def wait_for(self, text: str) -> None:
        """Read until the text shows up; fails when the program ends first."""
        while text not in self.shown:
            self.shown += os.read(self.controller, 65536).decode()
        self.shown = self.shown.split(text, 1)[1]


@pytest.fixture
def terminal(server: Scripted) -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    terminal.child.kill()
    terminal.child.wait()
    os.close(terminal.controller)


def test_ctrl_c_stops_the_answer_and_not_the_program(server: Scripted, terminal: Terminal) -> None:
    server.scripts = [[started(), delta("partial"), Stalls()], whole("whole")]
    terminal.wait_for("> ")
    terminal.type("one\n")
    terminal.wait_for("partial")
    terminal.interrupt()
    terminal.wait_for("[stopped]")
    assert server.cancelled.wait(5)
    terminal.wait_for("> ")
    terminal.type("two\n")
    terminal.wait_for("whole")
    assert [m.content for m in server.requests[-1].messages] == ["one", "partial", "two"]
    terminal.wait_for("> ")
    terminal.interrupt()
    terminal.wait_for("Ctrl-D leaves")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.child.wait(10) == 0


def test_a_refused_turn_is_forgotten(server: Scripted, terminal: Terminal) -> None:
    server.scripts = [[Fails(StatusCode.INVALID_ARGUMENT, "too long")], whole("fine")]
    terminal.wait_for("> ")
    terminal.type("bad\n")
    terminal.wait_for("error: invalid argument: too long")
    terminal.wait_for("> ")
    terminal.type("good\n")
    terminal.wait_for("fine")
    assert [m.content for m in server.requests[-1].messages] == ["good"]


def test_ctrl_c_ends_a_one_shot_command_with_130(server: Scripted) -> None:
    server.scripts = [[started(), delta("partial"), Stalls()]]
    with run_cli("generate", "x", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.read(7) == b"partial"
        child.send_signal(signal.SIGINT)
        assert child.wait(10) == 130
    assert server.cancelled.wait(5)


def test_help_comes_without_grpc_and_without_an_engine() -> None:
    program = (
        "import sys, twinjet.cli\n"
        "heavy = {'grpc', 'google', 'pydantic', 'numpy', 'torch', 'vllm'} & set(sys.modules)\n"
        "sys.exit(' '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def flags(**given: Any) -> Namespace:
    names = ("config", "model", "engine", "name", "host", "port", "allow_partial")
    return Namespace(**(dict.fromkeys(names) | given))


@pytest.mark.parametrize(
    ("given", "environ", "expected"),
    [
        ({}, {}, {"smollm2-135m-instruct": {"engine": "vllm", "model": "demo"}}),
        ({"model": "/m/llama/"}, {}, {"llama": {"engine": "vllm", "model": "/m/llama/"}}),
        ({"engine": "fake"}, {}, {"fake": {"engine": "fake", "model": "demo"}}),
        ({"name": "x"}, {}, {"x": {"engine": "vllm", "model": "demo"}}),
        ({"config": Path("c.toml")}, {}, None),
        ({}, {"TWINJET_DEPLOYMENTS__A__ENGINE": "fake"}, None),
    ],
)
def test_what_serve_serves(
    given: dict[str, Any], environ: dict[str, str], expected: dict[str, Any] | None
) -> None:
    assert serve_overrides(flags(**given), environ).get("deployments") == expected


def test_flags_of_serve_reach_the_server_settings_and_may_not_contradict() -> None:
    assert serve_overrides(flags(port=0, host="::"), {})["server"] == {"port": 0, "host": "::"}
    assert serve_overrides(flags(allow_partial=True), {})["server"] == {"allow_partial": True}
    with pytest.raises(ConfigError, match="--model, --name cannot be used"):
        serve_overrides(flags(config=Path("c"), model="m", name="n"), {})


@pytest.mark.parametrize(
    ("settings", "address", "model", "expected"),
    [
        ({}, "127.0.0.1:50051", "", ["-plaintext", "127.0.0.1:50051"]),
        ({}, "0.0.0.0:1", "m", ["-plaintext", "localhost:1", '"model": "m"']),
        ({"tls_cert": "/c.pem", "tls_key": "/k.pem"}, "[::]:1", "", ["-cacert /c.pem", "localhost:1"]),
    ],
)
def test_the_command_to_paste(
    settings: dict[str, Any], address: str, model: str, expected: list[str]
) -> None:
    config = Config.model_validate({"server": settings, "deployments": {"a": {"engine": "fake"}}})
    command = grpcurl_command(config, address, model)
    assert command.startswith("grpcurl ")
    assert command.endswith(" twinjet.v1.InferenceService/Chat")
    for part in expected:
        assert part in command


def test_serve_shows_loading_announces_itself_and_ends_with_0_on_sigterm() -> None:
    with run_cli("serve", "--engine", "fake", "--port", "0", stderr=subprocess.PIPE) as child:
        assert child.stderr is not None
        lines: list[str] = []
        for raw in child.stderr:
            lines.append(raw.decode())
            if "grpcurl" in lines[-1]:
                break
        child.terminate()
        lines += child.stderr.read().decode().splitlines()
        assert child.wait(20) == 0
    assert "starting the server" in lines[0]
    assert any("waiting for the first token" in line for line in lines)
    assert any("serving fake on 127.0.0.1:" in line for line in lines)
    assert not any("death" in line for line in lines)
