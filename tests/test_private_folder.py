"""Folders of this process in the temporary folder, and those that killed processes leave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from twinjet.private_folder import PrivateFolder, remove_left

OWNER = """
import subprocess, sys
from twinjet.private_folder import PrivateFolder

folder = PrivateFolder("test")
(folder.path / "socket").touch()
helper = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=sys.stdin)
print(folder.path, flush=True)
helper.wait()
"""
"""Makes a folder and waits, with a helper that outlives it, until its input ends."""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


@contextmanager
def owner() -> Iterator[tuple[subprocess.Popen[str], Path]]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", OWNER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def test_a_folder_is_for_its_user_alone_and_goes_when_told_and_with_its_object(temporary: Path) -> None:
    folders = [PrivateFolder("test"), PrivateFolder("test")]
    assert [folder.path.stat().st_mode & 0o777 for folder in folders] == [0o700] * 2
    (folders[0].path / "file").touch()
    folders[0].remove()
    folders[0].remove()
    assert list(temporary.iterdir()) == [folders[1].path]
    folders.clear()
    assert list(temporary.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_has_is_not(temporary: Path) -> None:
    own = PrivateFolder("test")
    with owner() as (living, its), owner() as (dead, left):
        assert remove_left() == []
        dead.send_signal(signal.SIGKILL)
        dead.wait()
        # Its helper, which still runs, has no part in the lock.
        assert remove_left() == [left]
        assert {*temporary.iterdir()} == {own.path, its}
        assert (its / "socket").exists()
        assert living.poll() is None


def test_a_folder_that_was_found_before_it_was_locked_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made = tempfile.mkdtemp
    removed: list[Path] = []

    def interrupted(*args: str, **kwargs: str) -> str:
        path = made(*args, **kwargs)
        if not removed:
            removed.extend(remove_left())
            assert removed == [Path(path)]
        return path

    monkeypatch.setattr(tempfile, "mkdtemp", interrupted)
    folder = PrivateFolder("test")
    assert folder.path.is_dir()
    assert folder.path not in removed
    assert remove_left() == []


def test_a_folder_that_is_removed_while_it_is_opened_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open
    removed: list[Path] = []

    def interrupted(path: Path, flags: int, **kwargs: int) -> int:
        descriptor = opened(path, flags, **kwargs)
        if not removed:
            # The remover's own look at it.
            removed.append(path)
            assert remove_left() == [path]
        return descriptor

    monkeypatch.setattr(os, "open", interrupted)
    folder = PrivateFolder("test")
    assert folder.path.is_dir()
    assert folder.path not in removed


def test_what_is_not_known_to_be_ours_stays(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = temporary / "elsewhere"
    outside.mkdir()
    (outside / "file").touch()
    (temporary / "twinjet-link.held").symlink_to(outside)
    (temporary / "twinjet-file.held").touch()
    (temporary / "twinjet-unlocked").mkdir()
    assert remove_left() == []
    (temporary / "twinjet-test-other.held").mkdir()
    with monkeypatch.context() as other_user:
        other_user.setattr(os, "geteuid", lambda: os.getuid() + 1)
        assert remove_left() == []
    assert (outside / "file").exists()
    assert remove_left() == [temporary / "twinjet-test-other.held"]
