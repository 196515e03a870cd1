"""Fixtures of the protocol tests: those of the service."""

from tests.server.conftest import _starts_counted_anew, door, serve

__all__ = ["_starts_counted_anew", "door", "serve"]
