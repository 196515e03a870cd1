"""What following one output through its grammar may cost where the engine runs.

The engine makes a mask between any two steps, and nobody's next token comes before it is done. A worker has tried each
grammar before; but where an ambiguous part lies behind a long beginning, no trial finds it, and each further token can take
longer than all before it. So the time is counted, and a request that takes more ends.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

START_S: Final = 0.1
"""Processor time that an output may take at any time."""
STEP_S: Final = 0.005
"""And for each mask. Those of the JSON-Schema-Test-Suite take .3 ms at most on average, over a vocabulary of 49,152."""


class Effort:
    """The processor time of one output's matching, on the thread that does it."""

    __slots__ = ("_left_s",)

    def __init__(self) -> None:
        self._left_s = START_S

    def is_spent(self) -> bool:
        """Whether more has been taken than is allowed by now."""
        return self._left_s < 0

    def allow_mask(self) -> None:
        """One more mask is to be made."""
        self._left_s += STEP_S

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count what is done meanwhile."""
        began = time.thread_time()
        try:
            yield
        finally:
            self._left_s -= time.thread_time() - began
