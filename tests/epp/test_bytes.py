"""Bytes of Envoy's protocol, of gRPC's frames and of load reports, good and bad."""

from __future__ import annotations

import gzip
import random
import struct
import zlib

import pytest

from twinjet._core import read_processing_request
from twinjet.epp import orca, wire
from twinjet.epp.frames import FrameError, FrameReader
from twinjet.scheduler.orca import OrcaReport
from twinjet.v1 import generation_pb2 as pb


def frame(message: bytes, flag: int = 0) -> bytes:
    return bytes([flag]) + struct.pack(">I", len(message)) + message


MESSAGE = pb.GenerateRequest(text="words " * 400).SerializeToString()


@pytest.mark.parametrize("step", [1, 3, 5, 1000, 10_000])
def test_a_message_in_pieces_is_whole_when_its_last_byte_is_there(step: int) -> None:
    reader = FrameReader("", 1 << 20)
    data = frame(MESSAGE)
    for place in range(0, len(data), step):
        assert not reader.has_enough
        reader.add(data[place : place + step])
    assert reader.has_enough and reader.message() == MESSAGE


@pytest.mark.parametrize(("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_compressed_messages_are_read_within_bounds(encoding: str, pack: object) -> None:
    reader = FrameReader(encoding, 1 << 20)
    reader.add(frame(pack(MESSAGE), 1))  # type: ignore[operator]
    assert reader.message() == MESSAGE
    bomb = FrameReader(encoding, 10_000)
    bomb.add(frame(pack(bytes(50_000_000)), 1))  # type: ignore[operator]
    assert len(bomb.message()) == 10_000


def test_what_is_too_long_is_enough_at_the_bound() -> None:
    reader = FrameReader("", 100)
    reader.add(frame(MESSAGE)[:50])
    assert not reader.has_enough
    reader.add(frame(MESSAGE)[50:])
    assert reader.has_enough and reader.message() == MESSAGE[:100]


@pytest.mark.parametrize(
    ("encoding", "data"),
    [
        ("", b""),
        ("", b"\0\0"),
        ("", frame(MESSAGE, 7)),
        ("snappy", frame(b"x", 1)),
        ("gzip", frame(b"zz", 1)),
    ],
)
def test_what_cannot_be_read_is_told(encoding: str, data: bytes) -> None:
    reader = FrameReader(encoding, 1 << 20)
    reader.add(data)
    with pytest.raises(FrameError):
        reader.message()


def test_a_second_message_is_left_alone() -> None:
    reader = FrameReader("", 1 << 20)
    reader.add(frame(MESSAGE) + frame(b"more"))
    assert reader.message() == MESSAGE


# Written with xds-protos 1.80.
GIVEN = {
    "headers": "12260a240a120a053a706174681a092f736f6d652e702f4d0a0e0a0274651a08747261696c65727342610a5f0a14656e766f79"
    "2e6c622e7375627365745f68696e7412470a450a25782d676174657761792d64657374696e6174696f6e2d656e64706f696e742d73756273"
    "6574121c321a0a0b1a09312e312e312e313a350a0b1a09322e322e322e323a355a020804",
    "body": "22070a036162631001",
    "trailers": "3a140a120a100a0b677270632d7374617475731a0130",
}


def test_messages_of_envoys_own_making_are_read() -> None:
    headers, body, trailers = (read_processing_request(bytes.fromhex(GIVEN[name])) for name in GIVEN)
    addresses = ["1.1.1.1:5", "2.2.2.2:5"]
    found = {":path": "/some.p/M", "te": "trailers"}
    assert headers == (wire.REQUEST_HEADERS, False, found, b"", wire.FULL_DUPLEX_STREAMED, 0, addresses, "")
    assert body == (wire.REQUEST_BODY, True, {}, b"abc", -1, -1, None, "")
    assert trailers == (wire.RESPONSE_TRAILERS, False, {"grpc-status": "0"}, b"", -1, -1, None, "")


def test_envoys_messages_are_read() -> None:
    headers = wire.field(1, wire.field(1, b":path") + wire.field(3, b"/p"))
    headers += wire.field(1, wire.field(1, b"old") + wire.field(2, b"value"))
    subset = wire.field(
        6, wire.field(1, wire.field(3, b"1.1.1.1:5")) + wire.field(1, wire.field(3, b"2.2.2.2:5"))
    )
    struct_ = wire.field(1, wire.field(1, b"x-gateway-destination-endpoint-subset") + wire.field(2, subset))
    metadata = wire.field(1, wire.field(1, b"envoy.lb.subset_hint") + wire.field(2, struct_))
    named = wire.field(1, b"source.port") + wire.field(2, wire.field(3, b"no address"))
    fields = wire.field(1, named)
    fields += wire.field(
        1, wire.field(1, b"source.address") + wire.field(2, wire.field(3, b"[2001:db8::1]:5"))
    )
    attributes = wire.field(1, b"envoy.filters.http.ext_proc") + wire.field(2, fields)
    message = (
        wire.field(2, wire.field(1, headers) + wire.number_field(3, 1))
        + wire.field(8, metadata)
        + wire.field(
            11, wire.number_field(1, wire.FULL_DUPLEX_STREAMED) + wire.number_field(2, wire.STREAMED)
        )
        + wire.field(9, attributes)
    )
    kind, ends, found, body, mode, response_mode, allowed, source = read_processing_request(message)
    assert (kind, ends, body) == (wire.REQUEST_HEADERS, True, b"")
    assert (mode, response_mode) == (wire.FULL_DUPLEX_STREAMED, wire.STREAMED)
    assert found == {":path": "/p", "old": "value"}
    assert allowed == ["1.1.1.1:5", "2.2.2.2:5"]
    assert source == "[2001:db8::1]:5"
    body_message = wire.field(4, wire.field(1, b"abc") + wire.number_field(2, 1))
    assert read_processing_request(body_message) == (wire.REQUEST_BODY, True, {}, b"abc", -1, -1, None, "")


def test_no_bytes_bring_the_reader_down() -> None:
    rng = random.Random(5)
    good = wire.field(2, wire.field(1, wire.field(1, wire.field(1, b":path") + wire.field(3, b"/p"))))
    for _ in range(5_000):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 5)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            read_processing_request(bytes(data[: rng.randrange(len(data) + 1)]))
        except ValueError:
            continue


def test_load_reports_are_read() -> None:
    named = {"waiting": 3.0, "running": 2.0, "waiting_tokens": 900.0, "kv_cache_utilization": 0.5}
    named |= {"expected_wait_s": 1.5, "a.serving": 1.0, "b.serving": 0.0, "a.waiting": 3.0}
    reading = orca.read(OrcaReport(0.5, 10, 0, {"kv_cache": 0.5}, named).encode())
    assert reading == orca.Reading(3, 2, 900, 0.5, 1.5, {"a": True, "b": False})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -5.0, 1e300])
def test_numbers_that_cannot_be_are_brought_into_bounds(value: float) -> None:
    names = ("waiting", "running", "waiting_tokens", "kv_cache_utilization", "expected_wait_s")
    reading = orca.read(OrcaReport(0.1, 1, 0, {}, dict.fromkeys(names, value)).encode())
    assert 0 <= reading.waiting <= 1e12 and 0 <= reading.kv_utilization <= 1
    assert reading.expected_wait_s is None or reading.expected_wait_s >= 0
    if value != value:
        assert reading.waiting == 1e12


def test_what_is_no_load_report_is_refused() -> None:
    rng = random.Random(9)
    good = OrcaReport(0.5, 10, 1, {"kv_cache": 0.5}, {"waiting": 1.0}).encode()
    for _ in range(5_000):
        data = bytearray(good)
        data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            orca.read(bytes(data[: rng.randrange(len(data) + 1)]))
        except ValueError:
            continue
