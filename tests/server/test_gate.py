"""Limits of open streams by whom a connection counts for."""

from __future__ import annotations

import pytest

from twinjet.config import ServerSettings
from twinjet.errors import Overloaded
from twinjet.server.gate import Gate


def test_streams_of_an_ipv6_network_count_as_of_one_address() -> None:
    gate = Gate(ServerSettings(max_streams_per_address=2))
    first, second, third = (f"ipv6:%5B2001:db8::{i}%5D:1" for i in range(1, 4))
    address = gate.count(first)
    gate.count(second)
    with pytest.raises(Overloaded):
        gate.count(third)
    gate.count("ipv6:%5B2001:db8:0:1::1%5D:1")
    gate.leave(first, address)
    gate.count(third)


def test_the_network_that_counts_as_one_can_be_set() -> None:
    wide = Gate(ServerSettings(client_ipv6_prefix=48))
    assert wide.count("ipv6:%5B2001:db8:1:2::1%5D:1") == wide.count("ipv6:%5B2001:db8:1:3::1%5D:1")
    single = Gate(ServerSettings(client_ipv6_prefix=128))
    assert single.count("ipv6:%5B2001:db8::1%5D:1") == "ipv6:2001:db8::1/128"
