"""What a person or a pipe says in an interactive chat: one turn at a time, a pasted text being one."""

from __future__ import annotations

import contextlib
import select
import sys

from twinjet.errors import ConfigError

_PROMPT = "> "
_PASTE_GAP_S = 0.02
"""Lines of one paste follow each other faster than anybody types."""


def decode(raw: bytes) -> str:
    """Give input as text. Raises ConfigError if it is not UTF-8."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"the input is not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}"
        ) from error


class TurnReader:
    """Reads turns from the input. From a pipe each line is one; on a terminal with editing and history."""

    def __init__(self) -> None:
        self.is_terminal = sys.stdin.isatty()
        self._marks_pastes = False
        if self.is_terminal:
            with contextlib.suppress(ImportError):
                self._marks_pastes = _set_up_editing()

    def read(self) -> str | None:
        """Give the next turn, None at the end. Raises KeyboardInterrupt; ConfigError for a pipe that is not UTF-8."""
        if not self.is_terminal:
            raw = sys.stdin.buffer.readline()
            return decode(raw).rstrip("\r\n") if raw else None
        try:
            said = input(_PROMPT)
            if not self._marks_pastes:
                while select.select([sys.stdin], [], [], _PASTE_GAP_S)[0]:
                    said += "\n" + input()
            said.encode()
        except EOFError:
            # The shell's prompt belongs on a line of its own.
            print(file=sys.stderr)
            return None
        except UnicodeError:
            print("error: the input is not UTF-8", file=sys.stderr)
            return ""
        return said


def _set_up_editing() -> bool:
    """Load line editing; True if it tells a paste from typed lines, as GNU readline does and libedit does not."""
    import readline

    if "libedit" in (readline.__doc__ or ""):
        return False
    # Python turns it off, for the sake of its own prompt.
    readline.parse_and_bind("set enable-bracketed-paste on")
    return True
