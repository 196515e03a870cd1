"""The command `twinjet`: serve, epp, generate, chat, models, load, tokenize.

Exit codes: 0 done, 1 the server refused or failed, 2 wrong usage or configuration, 130 Ctrl-C. Nothing heavy is
imported before a command needs it.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinjet.compare.arguments import compare_arguments
from twinjet.errors import ConfigError
from twinjet.interrupts import interrupts_cancel
from twinjet.turns import TurnReader, decode

if TYPE_CHECKING:
    from twinjet.client import Client, Event, Route, Sampling, Stream, TwinjetClientError
    from twinjet.config import Config

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

DEFAULT_ADDRESS = "localhost:50051"
LONGEST_TIMEOUT_S = 1e6
_INT32_MAX = 2**31 - 1


def _print_json(value: object) -> None:
    print(json.dumps(value, ensure_ascii=False), flush=True)


def _plain(value: Any) -> Any:
    """Give an answer as JSON takes it, without what is not known or empty."""
    if isinstance(value, dict):
        plain = {key: _plain(inner) for key, inner in value.items()}
        return {key: inner for key, inner in plain.items() if inner not in (None, "", [], {})}
    if isinstance(value, tuple):
        return [_plain(inner) for inner in value]
    return sorted(value) if isinstance(value, frozenset) else value


def _connect(arguments: argparse.Namespace) -> Client:
    import grpc

    from twinjet.client import Client

    credentials = None
    if arguments.tls or arguments.ca is not None:
        roots = None if arguments.ca is None else _certificates(arguments.ca)
        credentials = grpc.ssl_channel_credentials(roots)
    try:
        return Client(
            arguments.address,
            credentials=credentials,
            token=os.environ.get("TWINJET_TOKEN", ""),
            timeout_s=arguments.timeout,
        )
    except ValueError as error:
        raise ConfigError(f"{error} (--address, TWINJET_ADDRESS, TWINJET_TOKEN)") from error


def _certificates(path: Path) -> bytes:
    try:
        pem = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--ca: cannot read {path}: {error.strerror}") from error
    if b"-----BEGIN CERTIFICATE-----" not in pem:
        raise ConfigError(f"--ca: {path} holds no PEM certificate")
    return pem


def _sampling(arguments: argparse.Namespace) -> Sampling:
    from twinjet.client import Constraint, Sampling

    constraint = None
    for kind in ("json_schema", "regex", "ebnf"):
        if (value := getattr(arguments, kind)) is not None:
            constraint = Constraint(kind, value)
    return Sampling(
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        min_p=arguments.min_p,
        seed=arguments.seed,
        max_tokens=arguments.max_tokens,
        stop=tuple(arguments.stop),
        constraint=constraint,
    )


def _text_argument(text: str) -> str:
    return decode(sys.stdin.buffer.read()) if text == "-" else text


class _Shown:
    """The text of an answer as it is printed; its line is ended when the answer is, however that comes."""

    def __init__(self) -> None:
        self.text = ""

    def __enter__(self) -> _Shown:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # An error is reported on a line of its own; where nothing was shown there is no line to end.
        if (self.text or kind is None) and kind is not BrokenPipeError:
            print(flush=True)

    def add(self, text: str) -> None:
        # Kept first: Ctrl-C may come while it is being printed.
        self.text += text
        print(text, end="", flush=True)


def _show(stream: Stream, arguments: argparse.Namespace) -> None:
    """Print a stream as it comes."""
    from twinjet.client import Delta, Summary

    if arguments.json:
        with stream, interrupts_cancel(stream):
            for event in stream:
                _print_json({"event": type(event).__name__.lower()} | asdict(event))
        return
    with stream, _Shown() as shown, interrupts_cancel(stream):
        for event in stream:
            if isinstance(event, Delta):
                shown.add(event.text)
            elif isinstance(event, Summary) and arguments.stats:
                print(f"\n{_stats(event)}", end="", file=sys.stderr, flush=True)


def _stats(event: Event) -> str:
    from twinjet.client import Summary

    assert isinstance(event, Summary)
    timings, usage = event.timings, event.usage
    speed = f", {1 / timings.per_token_s:.1f} tokens/s" if timings.per_token_s else ""
    return (
        f"[{usage.prompt_tokens} + {usage.output_tokens} tokens, first after {timings.first_token_s:.2f} s, "
        f"{timings.total_s:.2f} s{speed}, seed {event.seed}]"
    )


def serve(arguments: argparse.Namespace) -> int:
    """Run a server."""
    from twinjet.config import load
    from twinjet.server.console import run

    def read() -> Config:
        return load(arguments.config, serve_overrides(arguments, os.environ))

    return run(read(), arguments.log_level, read)


def doctor(arguments: argparse.Namespace) -> int:
    """Compare the installed TensorRT-LLM with the interface that Twinjet was written against."""
    from twinjet.engines.tensorrt_llm.doctor import run

    return run(arguments)


def epp(arguments: argparse.Namespace) -> int:
    """Pick endpoints for Envoy: by cached prefix, load and adapter (its ext_proc protocol)."""
    from twinjet.epp.main import serve
    from twinjet.epp.settings import load

    flags = {k: v for k in ("host", "port") if (v := getattr(arguments, k)) is not None}
    overrides: dict[str, Any] = {"server": flags}
    if arguments.replicas:
        overrides["replicas"] = {"addresses": [a.strip() for a in arguments.replicas.split(",")]}
    return serve(load(arguments.config, overrides), arguments.log_level)


def serve_overrides(arguments: argparse.Namespace, environ: Mapping[str, str]) -> dict[str, Any]:
    """Give the settings that the flags of `serve` stand for. Raises ConfigError for flags that contradict."""
    from twinjet.environment import names_section

    flags = {k: getattr(arguments, k) for k in ("model", "engine", "name")}
    tree: dict[str, Any] = {
        "server": {k: v for k in ("host", "port") if (v := getattr(arguments, k)) is not None}
    }
    if arguments.allow_partial:
        tree["server"]["allow_partial"] = True
    named = [f"--{name}" for name, value in flags.items() if value is not None]
    is_elsewhere = arguments.config is not None or names_section(environ, "deployments")
    if is_elsewhere:
        if named:
            raise ConfigError(
                f"{', '.join(named)} cannot be used when deployments are configured elsewhere "
                "(--config or TWINJET_DEPLOYMENTS__...); change them there"
            )
        return tree
    from twinjet.models.demo import DEMO_MODEL, DEMO_MODEL_NAME

    model, engine = flags["model"] or DEMO_MODEL, flags["engine"] or "vllm"
    own_name = DEMO_MODEL_NAME if model == DEMO_MODEL else Path(model).absolute().name
    name = flags["name"] or ("fake" if engine == "fake" else own_name)
    tree["deployments"] = {name: {"engine": engine, "model": model}}
    return tree


def generate(arguments: argparse.Namespace) -> int:
    """Continue a prompt."""
    with _connect(arguments) as client:
        _show(
            client.generate(_text_argument(arguments.prompt), _sampling(arguments), model=arguments.model),
            arguments,
        )
    return EXIT_OK


def chat(arguments: argparse.Namespace) -> int:
    """Talk to a model: one message if given, else until the end of the input."""
    from twinjet.client import Message

    turns = [Message("system", arguments.system)] if arguments.system else []
    with _connect(arguments) as client:
        if arguments.message is not None:
            turns.append(Message("user", _text_argument(arguments.message)))
            _show(client.chat(turns, _sampling(arguments), model=arguments.model), arguments)
            return EXIT_OK
        if arguments.json:
            raise ConfigError("--json needs a message; an interactive chat is for people")
        return _converse(client, turns, arguments)


def _converse(client: Client, turns: list[Any], arguments: argparse.Namespace) -> int:
    from twinjet.client import Delta, Message, TwinjetClientError

    reader = TurnReader()
    if reader.is_terminal:
        print("Ctrl-C stops an answer, Ctrl-D leaves.", file=sys.stderr)
    sampling = _sampling(arguments)
    while True:
        try:
            said = reader.read()
        except KeyboardInterrupt:
            print("\nCtrl-D leaves.", file=sys.stderr)
            continue
        if said is None:
            return EXIT_OK
        if not said.strip():
            continue
        turns.append(Message("user", said))
        shown = _Shown()
        try:
            with client.chat(turns, sampling, model=arguments.model) as stream, shown:
                try:
                    with interrupts_cancel(stream):
                        for event in stream:
                            if isinstance(event, Delta):
                                shown.add(event.text)
                except KeyboardInterrupt:
                    print(" [stopped]", end="", flush=True)
        except TwinjetClientError as error:
            _report(error, as_json=False)
            # A refused turn would be refused again with every later one.
            if not shown.text:
                turns.pop()
                continue
        turns.append(Message("assistant", shown.text))


def compare(arguments: argparse.Namespace) -> int:
    """Measure two deployments side by side and say which is faster, and whether they say the same."""
    from twinjet.compare.command import run

    return run(arguments)


def routes(arguments: argparse.Namespace) -> int:
    """Show which deployments answer for each model, or change it."""
    with _connect(arguments) as client:
        if arguments.set is not None or arguments.remove is not None:
            client.set_route(
                _route(arguments), revision=arguments.revision, remove=arguments.remove is not None
            )
        listed = client.get_routes()
    if arguments.json:
        _print_json(_plain(asdict(listed)))
        return EXIT_OK
    rows: list[tuple[str, ...]] = [("MODEL", "WEIGHTS", "FALLBACK", "STICKY", "MIRROR")]
    for route in listed.routes:
        mirror = f"{route.mirror.deployment} {route.mirror.share:.0%}" if route.mirror else "-"
        rows.append(
            (
                route.model,
                " ".join(f"{name}={weight:g}" for name, weight in sorted(route.weights.items())),
                " ".join(route.fallback) or "-",
                route.sticky or "-",
                mirror,
            )
        )
    _print_table(rows)
    print(f"revision {listed.revision}; deployments: {', '.join(listed.deployments)}", file=sys.stderr)
    return EXIT_OK


def _route(arguments: argparse.Namespace) -> Route:
    from twinjet.client import Mirror, Route

    weights: dict[str, float] = {}
    for part in arguments.weight:
        name, equals, text = part.rpartition("=")
        try:
            weights[name] = float(text)
        except ValueError:
            equals = ""
        if not equals or not name:
            raise ConfigError(f"--weight {part}: write DEPLOYMENT=NUMBER")
    mirror = None
    if arguments.mirror is not None:
        name, _, text = arguments.mirror.rpartition("=")
        try:
            mirror = Mirror(name, float(text))
        except ValueError:
            raise ConfigError(f"--mirror {arguments.mirror}: write DEPLOYMENT=SHARE") from None
    model = arguments.set or arguments.remove or ""
    return Route(model, weights, tuple(arguments.fallback), arguments.sticky or "", mirror)


def models(arguments: argparse.Namespace) -> int:
    """List what is served."""
    with _connect(arguments) as client:
        listed = client.models()
    if arguments.json:
        _print_json([_plain(asdict(model)) for model in listed])
        return EXIT_OK
    rows: list[tuple[str, ...]] = [("MODEL", "STATE", "ENGINE", "CONTEXT", "SAMPLER", "BLOCKS")]
    for model in listed:
        state: str = model.state
        if model.loading is not None:
            state += f" {model.loading.done:.0%} ({model.loading.phase})"
        if model.failure:
            state += f" ({model.failure})"
        rows.append(
            (
                model.name,
                state,
                f"{model.engine.name} {model.engine.version}".strip() or "-",
                str(model.limits.max_context_tokens) if model.limits else "-",
                model.sampler.implementation if model.sampler else "-",
                model.block_manager.implementation if model.block_manager else "-",
            )
        )
    _print_table(rows)
    return EXIT_OK


def load(arguments: argparse.Namespace) -> int:
    """Show queues, running requests, KV blocks and speeds."""
    with _connect(arguments) as client:
        loads = client.get_load(arguments.model)
    if arguments.json:
        _print_json([_plain(asdict(entry)) for entry in loads])
        return EXIT_OK
    fields = ("waiting", "running", "engine_waiting", "engine_running", "kv_blocks_used", "kv_blocks_total")
    rows = [("MODEL", "DEPLOYMENT", *(f.upper().replace("_", " ") for f in fields), "TOKENS/S")]
    for entry in loads:
        values = ["-" if (v := getattr(entry, f)) is None else str(v) for f in fields]
        speed = entry.output_tokens_per_second
        rows.append((entry.model, entry.deployment, *values, "-" if speed is None else f"{speed:.1f}"))
    _print_table(rows)
    return EXIT_OK


def tokenize(arguments: argparse.Namespace) -> int:
    """Show the token ids of a text."""
    with _connect(arguments) as client:
        tokens = client.tokenize(_text_argument(arguments.text), model=arguments.model)
    if arguments.json:
        _print_json(asdict(tokens))
    else:
        print(" ".join(map(str, tokens.token_ids)))
        print(f"{len(tokens.token_ids)} of {tokens.max_context_tokens} tokens", file=sys.stderr)
    return EXIT_OK


def _whole(name: str, least: int, most: int) -> Callable[[str], int]:
    """Make a reader of whole numbers that a request can carry."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number") from None
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{value} is out of range; allowed: {least} to {most}")
        return value

    read.__name__ = name
    return read


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= LONGEST_TIMEOUT_S:
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} is not a time limit; allowed: above 0 to {LONGEST_TIMEOUT_S:g} seconds"
        )
    return value


def _print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _report(error: TwinjetClientError, *, as_json: bool) -> None:
    if as_json:
        facts = {
            "code": error.code,
            "reason": error.reason,
            "message": error.message,
            "violations": [asdict(v) for v in error.violations],
            "retry_after_s": error.retry_after_s,
        }
        print(json.dumps({"error": facts}, ensure_ascii=False), file=sys.stderr)
        return
    status = error.code.lower().replace("_", " ")
    print(f"error: {status}" + ("" if error.violations else f": {error.message}"), file=sys.stderr)
    for violation in error.violations:
        print(f"  {violation.field}: {violation.message}", file=sys.stderr)
    if error.retry_after_s is not None:
        print(f"  try again in {error.retry_after_s:g} s", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="twinjet", description="Serve language models over gRPC, and use them."
    )
    from twinjet.engines.tensorrt_llm.doctor import add_arguments as add_doctor_arguments

    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        about = (run.__doc__ or "").split("\n")[0]
        command = commands.add_parser(run.__name__, help=about, description=about)
        command.set_defaults(run=run, json=False)
        return command

    def add_client(run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        command = add(run)
        address = os.environ.get("TWINJET_ADDRESS", DEFAULT_ADDRESS)
        command.add_argument(
            "--address", default=address, help="host:port; default: $TWINJET_ADDRESS, else %(default)s"
        )
        command.add_argument("--tls", action="store_true", help="use TLS with the system's certificates")
        command.add_argument("--ca", type=Path, metavar="PEM", help="use TLS and trust these certificates")
        command.add_argument(
            "--timeout", type=_seconds, metavar="S", help="deadline in seconds; default: none"
        )
        command.add_argument("--json", action="store_true", help="print JSON, one value or event a line")
        return command

    def add_model(command: argparse.ArgumentParser) -> None:
        command.add_argument("--model", default="", help="public model name; default: the server's only one")

    def add_sampling(command: argparse.ArgumentParser) -> None:
        add_model(command)
        command.add_argument("--max-tokens", type=_whole("N", 1, _INT32_MAX), metavar="N")
        command.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
        command.add_argument("--top-p", type=float, metavar="P")
        command.add_argument("--top-k", type=_whole("K", -1, _INT32_MAX), metavar="K")
        command.add_argument("--min-p", type=float, metavar="P")
        command.add_argument("--seed", type=_whole("seed", 0, 2**64 - 1))
        command.add_argument("--stop", action="append", default=[], metavar="TEXT", help="may be repeated")
        grammar = command.add_mutually_exclusive_group()
        grammar.add_argument("--json-schema", metavar="JSON", help="the answer satisfies this schema")
        grammar.add_argument("--regex", metavar="PATTERN", help="the answer matches this pattern")
        grammar.add_argument("--ebnf", metavar="GRAMMAR", help="the answer follows this grammar")
        command.add_argument("--stats", action="store_true", help="show tokens and timings on stderr")

    command = add(doctor)
    add_doctor_arguments(command)
    command.add_argument("--json", action="store_true", help="print a JSON object")

    command = add(serve)
    command.add_argument("--config", type=Path, metavar="TOML", help="configuration file")
    command.add_argument("--model", metavar="FOLDER", help='model folder, or "demo" (default)')
    command.add_argument("--engine", choices=("vllm", "tensorrt_llm", "fake"), help="default: vllm")
    command.add_argument("--name", help="public model name; default: the folder's")
    command.add_argument("--host", help="default: 127.0.0.1")
    command.add_argument("--port", type=int, help="default: 50051; 0 picks a free one")
    command.add_argument(
        "--allow-partial", action="store_true", help="go on when one deployment cannot work as configured"
    )
    command.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")

    command = add(epp)
    command.add_argument("--config", type=Path, metavar="TOML", help="configuration file")
    command.add_argument("--replicas", metavar="IP:PORT,...", help="the servers to choose among")
    command.add_argument("--host", help="default: 127.0.0.1")
    command.add_argument("--port", type=int, help="default: 9002; 0 picks a free one")
    command.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")

    command = add_client(generate)
    command.add_argument("prompt", help="text to continue; - reads it from the input")
    add_sampling(command)

    command = add_client(chat)
    command.add_argument(
        "message", nargs="?", help="one message; - reads it from the input; none: interactive"
    )
    command.add_argument("--system", metavar="TEXT", help="system message")
    add_sampling(command)

    command = add_client(compare)
    command.add_argument("a", metavar="A", help="MODEL or HOST:PORT/MODEL; or the word report")
    command.add_argument("b", metavar="B", help="the other one; with report, the data of an earlier run")
    compare_arguments(command)

    command = add_client(routes)
    change = command.add_mutually_exclusive_group()
    change.add_argument(
        "--set", metavar="MODEL", help="replace this model's route by what the other flags say"
    )
    change.add_argument("--remove", metavar="MODEL", help="take this model's route away")
    command.add_argument(
        "--weight", action="append", default=[], metavar="DEPLOYMENT=W", help="may be repeated"
    )
    command.add_argument(
        "--fallback", action="append", default=[], metavar="DEPLOYMENT", help="may be repeated"
    )
    command.add_argument(
        "--sticky", choices=("tenant", "session"), help="keep a tenant or session at one deployment"
    )
    command.add_argument("--mirror", metavar="DEPLOYMENT=SHARE", help="copy this share of requests there")
    command.add_argument(
        "--revision", type=int, metavar="N", help="refuse if the routes are at another revision"
    )

    add_client(models)
    add_model(add_client(load))
    command = add_client(tokenize)
    command.add_argument("text", help="text; - reads it from the input")
    add_model(command)
    return parser


def _check_text(arguments: argparse.Namespace) -> None:
    """Refuse text that no request can carry; paths may hold any bytes."""
    for name, value in vars(arguments).items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                _decode_argument(name, text)


def _decode_argument(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{name.replace('_', '-')}: {text[:40]!a} is not UTF-8") from None


def main(argv: list[str] | None = None) -> int:
    """Run one command; return its exit code."""
    arguments = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that cannot show a character gets its escape instead of ending the answer.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        _check_text(arguments)
        return int(arguments.run(arguments))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone; nothing may be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except Exception as error:
        from twinjet.client import TwinjetClientError

        if not isinstance(error, TwinjetClientError):
            raise
        _report(error, as_json=arguments.json)
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
