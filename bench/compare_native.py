"""What Twinjet's sampler and block manager are worth: the same model with and without them, by `twinjet compare`.

    python bench/compare_native.py FOLDER [--limit SECONDS]

Starts a server of deploy/examples/native-on-off.toml (SmolLM2 on this machine's CPU) and compares its two deployments
twice: greedy, and with temperature 0.8 and top-p 0.95, into FOLDER/greedy and FOLDER/top-p. What the limit (of each) ended
goes on when the command is given again; the exit code is 130 until all is complete. Flags that are not known here go to
`twinjet compare`.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from twinjet.client import Client

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "deploy" / "examples"
MODELS = ("native", "stock")
KINDS: dict[str, list[str]] = {"greedy": [], "top-p": ["--temperature", "0.8", "--top-p", "0.95"]}
LOAD_S = 300.0


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    """Wait for both models. Raises SystemExit where the server ended or takes too long."""
    ends_at = time.monotonic() + LOAD_S
    while time.monotonic() < ends_at and process.poll() is None:
        time.sleep(0.5)
        found = re.search(r"listening on (\S+)", log.read_text())
        if found is None:
            continue
        with Client(found[1]) as client:
            if all(client.get_model(name).state == "ready" for name in MODELS):
                return found[1]
    raise SystemExit(f"the server is not ready:\n{log.read_text()[-4000:]}")


def _compare(address: str, folder: Path, limit_s: float, flags: list[str]) -> int:
    where = ["--resume" if (folder / "run.jsonl").exists() else "--out", str(folder)]
    command = [
        sys.executable, "-m", "twinjet.cli", "compare", *MODELS, "--address", address, *where,
        "--allow", "sampler", "--allow", "block_manager", "--prompts", str(EXAMPLES / "prompts.txt"), *flags,
    ]  # fmt: skip
    with subprocess.Popen(command) as process:
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            return process.wait(60)


def main() -> int:
    """Serve, compare, stop."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=float, default=24 * 3600.0, metavar="SECONDS", help="of each")
    arguments, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "server.log"
        settings = Path(scratch) / "twinjet.toml"
        settings.write_text(
            '[server]\nport = 0\nhost = "127.0.0.1"\n' + (EXAMPLES / "native-on-off.toml").read_text()
        )
        command = [sys.executable, "-m", "twinjet.cli", "serve", "--config", str(settings)]
        with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
            try:
                address = _address(process, log)
                return max(
                    _compare(address, arguments.folder / kind, arguments.limit, [*own, *flags])
                    for kind, own in KINDS.items()
                )
            finally:
                process.terminate()
                process.wait(60)


if __name__ == "__main__":
    sys.exit(main())
