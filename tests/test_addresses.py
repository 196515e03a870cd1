"""Whom a connection counts for."""

from __future__ import annotations

import pytest

from twinjet.addresses import address_of, address_of_source


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:192.0.2.1:1234", "ipv4:192.0.2.1"),
        ("ipv6:%5B2001:db8:1:2::1%5D:1234", "ipv6:2001:db8:1:2::/64"),
        ("ipv6:%5B2001:db8:1:2:ffff::9%5D:4321", "ipv6:2001:db8:1:2::/64"),
        ("ipv6:[2001:db8:1:3::1]:1234", "ipv6:2001:db8:1:3::/64"),
        ("ipv6:%5B::1%5D:1234", "ipv6:::/64"),
        ("ipv6:%5B::ffff:192.0.2.1%5D:1234", "ipv4:192.0.2.1"),
        ("ipv6:%5Bfe80::1%252%5D:1234", "ipv6:fe80::/64%2"),
        ("ipv6:%5Bfe80::2%252%5D:1234", "ipv6:fe80::/64%2"),
        ("ipv6:%5Bfe80::1%25eth0%5D:1234", "ipv6:fe80::/64%eth0"),
        ("unix:", "unix"),
        ("unix:/run/client:1", "unix"),
        ("ipv6:nonsense:1", "ipv6:nonsense"),
        ("nonsense", "nonsense"),
    ],
)
def test_an_address_is_one_of_ipv4_or_a_network_of_ipv6(peer: str, address: str) -> None:
    assert address_of(peer, 64) == address


@pytest.mark.parametrize(
    ("source", "address"),
    [
        ("192.0.2.1:1234", "ipv4:192.0.2.1"),
        ("[2001:db8:1:2::1]:1234", "ipv6:2001:db8:1:2::/64"),
        ("[::ffff:192.0.2.1]:1234", "ipv4:192.0.2.1"),
    ],
)
def test_envoys_addresses_give_the_same(source: str, address: str) -> None:
    assert address_of_source(source, 64) == address
