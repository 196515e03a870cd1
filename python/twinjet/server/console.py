"""`twinjet serve` as a person sees it: loading with a bar, then where it listens and a command to try."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Callable

from twinjet.config import Config
from twinjet.engines.supervisor import State
from twinjet.progress import Progress, ProgressHandler
from twinjet.server.main import Server, serve

_QUESTION = {
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    # So that everybody sees the same answer.
    "sampling": {"temperature": 0},
}


def grpcurl_command(config: Config, address: str, model: str = "") -> str:
    """Give a command line that asks the server something, to be pasted into a shell. model: "" for the only one."""
    host, _, port = address.rpartition(":")
    reachable = "localhost" if host in ("", "0.0.0.0", "[::]") else host
    server = config.server
    security = ["-plaintext"]
    if server.tls_cert is not None:
        security = ["-cacert", str(server.tls_cert)]
        if server.tls_client_ca is not None:
            security += ["-cert", "CLIENT.pem", "-key", "CLIENT-KEY.pem"]
    question = ({"model": model} if model else {}) | _QUESTION
    return shlex.join(
        [
            "grpcurl", *security, "-d", json.dumps(question),
            f"{reachable}:{port}", "twinjet.v1.InferenceService/Chat",
        ]
    )  # fmt: skip


class _Console:
    """Shows what changes; called from the server's loop."""

    def __init__(self, config: Config, progress: Progress) -> None:
        self._config = config
        self._progress = progress
        self._was_ready = False

    def changed(self, server: Server) -> None:
        if server.deployments.is_draining:
            self._progress.update("stopping: running requests finish first, unless Ctrl-C comes again")
            return
        supervisors = [d.supervisor for d in server.deployments.by_name.values()]
        waiting = [s for s in supervisors if s.state in (State.LOADING, State.RESTARTING)]
        if waiting:
            slowest = min(waiting, key=lambda s: s.progress.done)
            done = sum(s.progress.done for s in waiting) + len(supervisors) - len(waiting)
            self._progress.update(f"{slowest.name}: {slowest.progress.phase}", done / len(supervisors))
            return
        self._progress.pause()
        if not self._was_ready and any(s.state is State.READY for s in supervisors):
            self._was_ready = True
            self._announce(server)

    def _announce(self, server: Server) -> None:
        deployments = server.deployments
        models = [model for model in deployments.models if deployments.is_serving(model)]
        self._progress.say(
            f"serving {', '.join(models)} on {server.address} "
            f"after {self._progress.elapsed_s:.1f} s; Ctrl-C stops it. Try:"
        )
        model = models[0] if len(deployments.models) > 1 else ""
        self._progress.say(f"\n  {grpcurl_command(self._config, server.address, model)}\n")


def run(config: Config, log_level: str = "info", read: Callable[[], Config] | None = None) -> int:
    """Serve until told to stop, showing progress on stderr; return the exit code (see server.main.serve)."""
    with Progress() as progress:
        handler = ProgressHandler(progress)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.basicConfig(level=logging.WARNING, handlers=[handler])
        logging.getLogger("twinjet").setLevel(log_level.upper())
        progress.update("starting the server", 0.0)
        return serve(config, _Console(config, progress).changed, read)
