"""Fixtures of the client's tests."""

from collections.abc import Iterator

import pytest

from tests.client.scripted import Scripted, running
from tests.server.conftest import _starts_counted_anew as _starts_counted_anew
from tests.server.conftest import door as door
from tests.server.conftest import serve as serve


@pytest.fixture
def server(door: str) -> Iterator[Scripted]:
    with running(door) as scripted:
        yield scripted
