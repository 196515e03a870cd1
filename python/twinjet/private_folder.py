"""Folders for this process's sockets and files in the temporary folder, and the removal of what dead processes left.

A folder is locked (flock) as long as its process lives: the kernel lets go of the lock however that ends, and no process
id can be taken for another's. systemd-tmpfiles, too, leaves a locked folder alone, however old.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import weakref
from pathlib import Path

_PREFIX = "twinjet-"
_SUFFIX = ".held"
"""Of folders that are locked while they are used; without it nothing is known of a folder."""


class PrivateFolder:
    """A folder that only this user may enter; once this process is dead, any later one of this user's may remove it.

    kind: what is in it, for people who look. Raises OSError if the temporary folder cannot be written.
    """

    def __init__(self, kind: str) -> None:
        self.path, lock = _made(kind)
        self._finalizer = weakref.finalize(self, _remove, self.path, lock)

    def remove(self) -> None:
        """Remove it with all that is in it. Idempotent, and done by itself with this object's end."""
        self._finalizer()


def remove_left() -> list[Path]:
    """Remove this user's folders whose processes are dead; gives their paths. Blocks while files are removed."""
    found = Path(tempfile.gettempdir()).glob(f"{_PREFIX}*{_SUFFIX}")
    return [path for path in found if _removed_if_left(path)]


def _made(kind: str) -> tuple[Path, int]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{kind}-", suffix=_SUFFIX))
        # Whoever looks for left folders may have found it before it was locked, and removed it.
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            # Where nothing can be locked, nobody takes it for left either.
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
            if _is_at(path, lock):
                return path, lock
            os.close(lock)


def _remove(path: Path, lock: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)


def _removed_if_left(path: Path) -> bool:
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        if os.fstat(lock).st_uid != os.geteuid():
            return False
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_at(path, lock):
            return False
        shutil.rmtree(path, ignore_errors=True)
    except OSError:
        return False
    finally:
        os.close(lock)
    return not path.exists()


def _is_at(path: Path, descriptor: int) -> bool:
    """Tell whether a path still leads to the folder that was opened by it."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False
