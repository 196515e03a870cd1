"""The command line, as processes and through main(), against a scripted server on a real socket."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from grpc import StatusCode

from tests.client.scripted import Fails, Scripted, Stalls, delta, running, started, whole
from twinjet.cli import main, serve_overrides
from twinjet.client._address import check_address
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
    assert json.loads(output("models", "--json")) == [{"name": "m", "state": "ready"}]
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
        ["generate", "x", "--max-tokens", "2147483648"],
        ["generate", "x", "--max-tokens", "0"],
        ["generate", "x", "--top-k", "99999999999"],
        ["chat", "x", "--seed", "-1"],
        ["chat", "x", "--seed", "18446744073709551616"],
        ["chat", "x", "--seed", "9" * 5000],
        *(["models", "--timeout", t] for t in ("inf", "-inf", "nan", "0", "-1", "1e300", "soon")),
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


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("localhost:99999", "'99999' in 'localhost:99999' is not a port; allowed: 1 to 65535"),
        ("localhost:0", "is not a port"),
        ("localhost:http", "is not a port"),
        ("localhost:", "is not a port"),
        ("localhost", "has no port; write localhost:50051"),
        (":50051", "has no host; write localhost:50051"),
        ("::1", "is an IPv6 address without brackets"),
        ("[::1]", "has no port; write [::1]:50051"),
        ("dns:///localhost:99999", "is not a port"),
        ("http://localhost:50051/", "is a URL; write localhost:50051"),
        ("", "is not an address"),
        ("local host:1", "is not an address"),
    ],
)
def test_an_address_that_leads_elsewhere_is_refused(
    address: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["models", "--address", address]) == 2
    assert message in capsys.readouterr().err
    monkeypatch.setenv("TWINJET_ADDRESS", address)
    assert main(["models"]) == 2


def test_addresses_of_every_kind_are_taken() -> None:
    for address in (
        "localhost:50051", "[::1]:1", "dns:///h:65535", "dns:h:5", "dns://8.8.8.8/h:5", "ipv4:1.2.3.4:5,1.2.3.5:6",
        "ipv6:[::1]:5", "unix:/tmp/x", "unix:///tmp/x", "unix-abstract:x", "xds:///service",
    ):  # fmt: skip
        assert check_address(address) == address


def test_unusable_certificates_and_tokens_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "ca.pem").write_text("nothing")
    assert main(["models", "--ca", str(tmp_path / "ca.pem")]) == 2
    assert "holds no PEM certificate" in capsys.readouterr().err
    monkeypatch.setenv("TWINJET_TOKEN", "secret\n")
    assert main(["models"]) == 2
    err = capsys.readouterr().err
    assert "TWINJET_TOKEN" in err and "secret" not in err


LATIN = "caf\u00e9".encode("latin-1")


@pytest.mark.parametrize(
    ("arguments", "given", "message"),
    [
        (["generate", "-"], LATIN, "the input is not UTF-8: byte 0xe9 at offset 3"),
        (["chat", "-"], LATIN, "the input is not UTF-8"),
        (["chat"], LATIN + b"\n", "the input is not UTF-8"),
        (["tokenize", "-"], b"\xff", "the input is not UTF-8"),
        ([b"generate", LATIN], b"", "prompt: 'caf\\udce9' is not UTF-8"),
        ([b"generate", b"x", b"--stop", LATIN], b"", "stop: "),
        ([b"chat", b"x", b"--system", LATIN], b"", "system: "),
        ([b"models", b"--address", LATIN], b"", "address: "),
        ([b"serve", b"--engine", b"fake", b"--name", LATIN], b"", "name: "),
    ],
)
def test_what_is_not_utf_8_is_told_and_exits_with_2(
    server: Scripted, arguments: list[Any], given: bytes, message: str
) -> None:
    with run_cli(*arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        out, err = child.communicate(given, timeout=30)
    assert (child.returncode, out) == (2, b""), err
    assert message in err.decode()
    assert b"Traceback" not in err
    assert not server.requests


def test_a_terminal_that_cannot_show_a_character_gets_its_escape(server: Scripted) -> None:
    server.scripts = [whole("caf\u00e9 \u4f60")]
    with run_cli(
        "generate", "x", stdout=subprocess.PIPE, env=os.environ | {"PYTHONIOENCODING": "latin-1"}
    ) as child:
        assert child.communicate(timeout=30)[0] == b"caf\xe9 \\u4f60\n"
        assert child.returncode == 0


def test_an_error_after_text_has_a_line_of_its_own(
    server: Scripted, capfd: pytest.CaptureFixture[str]
) -> None:
    server.scripts = [[started(), delta("partial"), Fails(StatusCode.UNAVAILABLE, "gone")]]
    assert main(["generate", "x"]) == 1
    out, err = capfd.readouterr()
    assert (out, err) == ("partial\n", "error: unavailable: gone\n")


def run_cli(*arguments: str | bytes, **options: Any) -> subprocess.Popen[bytes]:
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

    def __init__(self, program: Sequence[str] = ("-m", "twinjet.cli", "chat")) -> None:
        self.controller, terminal = pty.openpty()
        self.child = subprocess.Popen(
            [sys.executable, *program],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
        )
        os.close(terminal)
        self.shown = ""

    def close(self) -> None:
        self.child.kill()
        self.child.wait()
        os.close(self.controller)

    def type(self, text: str | bytes) -> None:
        os.write(self.controller, text.encode() if isinstance(text, str) else text)

    def interrupt(self) -> None:
        self.child.send_signal(signal.SIGINT)

    def interrupt_at_prompt(self, hint: str) -> None:
        """Interrupt, again where nothing comes of it: Python's readline misses a signal between its prompt and its select."""
        self.interrupt()
        while hint not in self.shown:
            if select.select([self.controller], [], [], 1.0)[0]:
                self._read()
            else:
                self.interrupt()
        self.wait_for(hint)

    def wait_for(self, text: str) -> None:
        """Read until the text shows up; fails when the program ends first."""
        while text not in self.shown:
            self._read()
        self.shown = self.shown.split(text, 1)[1]

    def _read(self) -> None:
        self.shown += os.read(self.controller, 65536).decode(errors="replace")


@pytest.fixture
def terminal(server: Scripted) -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    terminal.close()


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
    terminal.interrupt_at_prompt("Ctrl-D leaves")
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


def test_an_error_after_text_does_not_touch_the_text(server: Scripted, terminal: Terminal) -> None:
    server.scripts = [[started(), delta("partial"), Fails(StatusCode.UNAVAILABLE, "gone")], whole("fine")]
    terminal.wait_for("> ")
    terminal.type("one\n")
    terminal.wait_for("partial\r\nerror: unavailable: gone\r\n")
    terminal.wait_for("> ")
    terminal.type("two\n")
    terminal.wait_for("fine")
    assert [m.content for m in server.requests[-1].messages] == ["one", "partial", "two"]


def test_a_paste_of_several_lines_is_one_message(server: Scripted, terminal: Terminal) -> None:
    terminal.wait_for("> ")
    terminal.type("\x1b[200~one\ntwo\nthree\x1b[201~\n")
    terminal.wait_for("hello")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.child.wait(10) == 0
    assert [[m.content for m in r.messages] for r in server.requests] == [["one\ntwo\nthree"]]


PLAIN = """
import sys
sys.modules["readline"] = None  # as in a Python without it
from twinjet.cli import main
sys.exit(main(["chat"]))
"""


def test_a_paste_is_one_message_without_line_editing_too(server: Scripted) -> None:
    terminal = Terminal(program=["-c", PLAIN])
    try:
        terminal.wait_for("> ")
        terminal.type("one\ntwo\nthree\n")
        terminal.wait_for("hello")
        assert [[m.content for m in r.messages] for r in server.requests] == [["one\ntwo\nthree"]]
    finally:
        terminal.close()


@pytest.mark.timeout(60)
def test_input_that_is_not_utf_8_does_not_end_a_chat(server: Scripted) -> None:
    terminal = Terminal(program=["-c", PLAIN])
    try:
        terminal.wait_for("> ")
        terminal.type(LATIN + b"\n")
        terminal.wait_for("error: the input is not UTF-8")
        terminal.wait_for("> ")
        terminal.type("fine\n")
        terminal.wait_for("hello")
        assert [m.content for m in server.requests[-1].messages] == ["fine"]
    finally:
        terminal.close()


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
