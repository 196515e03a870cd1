"""The distribution twinjet-client: what is in it, and that it installs and works where there is no compiler."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.client.scripted import Scripted

ROOT = Path(__file__).resolve().parents[2]
PROJECT = ROOT / "python"


@pytest.fixture
def door() -> str:
    """One is enough for what is installed."""
    return "auto"


def _project(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text())


def _run(*command: str | Path, **options: Any) -> str:
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, check=False, timeout=280, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, built from the checkout."""
    out = tmp_path_factory.mktemp("sdist")
    _run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", out, PROJECT)
    (archive,) = out.iterdir()
    return archive


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the checkout."""
    out = tmp_path_factory.mktemp("wheel")
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", out, PROJECT)
    (archive,) = out.iterdir()
    return archive


def _names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_it_is_pure_python_with_the_client_and_the_stubs_alone(wheel: Path) -> None:
    assert wheel.name == "twinjet_client-0.1.0-py3-none-any.whl"
    names = _names(wheel)
    source = {str(p.relative_to(PROJECT)) for p in (PROJECT / "twinjet" / "client").glob("*.py")}
    assert {n for n in names if n.startswith("twinjet/client/")} == source
    rest = {n for n in names if not n.startswith(("twinjet/client/", "twinjet/v1/"))}
    assert rest == {"twinjet/__init__.py", "twinjet/py.typed"}
    protos = {p.stem for p in (ROOT / "proto" / "twinjet" / "v1").glob("*.proto")}
    assert {f"twinjet/v1/{stem}_pb2.py" for stem in protos} <= names
    assert {f"twinjet/v1/{stem}_pb2.pyi" for stem in protos} <= names


def test_the_two_distributions_share_no_file_and_one_version(wheel: Path, tmp_path: Path) -> None:
    # Without the extension, whose compilation takes minutes and adds one file.
    _run(
        sys.executable, "-m", "build", "--wheel", "--no-isolation", "-Cwheel.cmake=false", "-o", tmp_path, ROOT
    )  # fmt: skip
    (main_wheel,) = tmp_path.iterdir()
    names = _names(main_wheel)
    assert {"twinjet/cli.py", "twinjet/server/main.py", "twinjet/_core.pyi"} <= names
    assert names & _names(wheel) == set()
    main = _project(ROOT)
    version = _project(PROJECT)["project"]["version"]
    assert main["project"]["version"] == version
    assert f"twinjet-client=={version}" in main["project"]["dependencies"]


def test_the_source_distribution_makes_the_same_wheel(wheel: Path, sdist: Path, tmp_path: Path) -> None:
    """Away from the checkout, so from the stubs that it carries."""
    with tarfile.open(sdist) as archive:
        # Python before 3.11.4 has no filters.
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (folder,) = tmp_path.iterdir()
    out = tmp_path / "out"
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", out, folder)
    (again,) = out.iterdir()
    assert _names(again) == _names(wheel)


USE = """
import sys
from twinjet.client import Client, Sampling
with Client(sys.argv[1]) as client:
    print(client.chat([{"role": "user", "content": "x"}], Sampling(stop="!")).text())
    print(client.get_model().state)
"""


def test_it_installs_without_a_compiler_and_works(wheel: Path, server: Scripted, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    _run(sys.executable, "-m", "venv", venv)
    python = venv / "bin" / "python"
    # The versions that are in use here, which pip has at hand.
    pins = tmp_path / "pins.txt"
    pins.write_text(
        "".join(
            f"{name}=={importlib.metadata.version(name)}\n"
            for name in ("grpcio", "protobuf", "typing-extensions")
        )
    )
    no_compiler = dict.fromkeys(("CC", "CXX", "CUDACXX"), "/bin/false")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | no_compiler
    _run(
        python, "-m", "pip", "install", "--disable-pip-version-check", "--only-binary=:all:", "-c", pins, wheel,
        env=environment, cwd=tmp_path,
    )  # fmt: skip
    listed = _run(python, "-m", "pip", "list", "--format", "freeze", env=environment)
    names = {line.partition("==")[0].lower().replace("_", "-") for line in listed.splitlines()}
    assert names - {"pip", "setuptools"} == {"twinjet-client", "grpcio", "protobuf", "typing-extensions"}
    said = _run(python, "-I", "-c", USE, server.address, env=environment, cwd=tmp_path)
    assert said.split() == ["hello", "ready"]
    assert list(server.requests[0].sampling.stop) == ["!"]


def test_its_page_names_what_exists() -> None:
    text = (PROJECT / "README.md").read_text()
    import twinjet.client

    for name in re.findall(r"`(\w+)(?:\(\))?`", text):
        exported = hasattr(twinjet.client, name)
        method = any(hasattr(kind, name) for kind in (twinjet.client.Client, twinjet.client.Stream))
        field = name in dir(twinjet.client.TwinjetClientError("x")) or name in ("stop", "grpcio", "protobuf")
        assert exported or method or field, name
