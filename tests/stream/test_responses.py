"""The native encoder of GenerateResponse against protobuf, and the streams behind it."""

from __future__ import annotations

import os
import struct
from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinjet._core import Pump, Stream
from twinjet.engines.fake import EOS, FakeTokenizer
from twinjet.v1 import generation_pb2 as pb

VOCABULARY = FakeTokenizer.vocabulary

_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
_u32 = st.integers(0, 2**32 - 1)
_float = st.floats(width=32, allow_nan=False)
_row = st.integers(1, 3).flatmap(
    lambda width: st.tuples(
        st.lists(st.integers(0, 257), min_size=width, max_size=width),
        st.lists(_float, min_size=width, max_size=width),
        st.none() | st.integers(1, 2**31),
    )
)
_ending = st.one_of(
    st.none(),
    st.just(("length", None, False)),
    st.just(("stop", None, False)),
    st.tuples(st.just("stop"), st.integers(0, 2**31 - 1), st.booleans()),
    st.tuples(st.just("stop"), _text.filter(bool), st.just(False)),
)


def make_stream(num_outputs: int = 1, **facts: Any) -> Stream:
    rules: dict[str, Any] = {
        "stop": [], "eos_token_ids": [EOS], "stop_token_ids": [], "min_tokens": 0, "max_tokens": 10**9,
        "include_stop": False, "skip_special": True,
    }  # fmt: skip
    return Stream(VOCABULARY, num_outputs=num_outputs, **(rules | facts))


def _logprobs(rows: list[Any]) -> list[pb.TokenLogprobs]:
    made = []
    for ids, logprobs, rank in rows:
        entries = [
            pb.Logprob(token_id=i, logprob=max(value, -9999.0), rank=place, text=VOCABULARY.token_text(i))
            for i, value, place in zip(ids, logprobs, [rank, *range(1, len(ids))], strict=True)
        ]
        made.append(pb.TokenLogprobs(chosen=entries[0], top=entries[1:]))
    return made


@given(
    text=_text,
    ids=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5),
    rows=st.lists(_row, max_size=3),
    ending=_ending,
    index=st.integers(0, 200),
)
def test_deltas_and_ends(text: str, ids: list[int], rows: list[Any], ending: Any, index: int) -> None:
    stream, pump = make_stream(201), Pump()
    key = pump.add(stream, None)
    pump.put_made(key, index, text, ids, rows, ending, 1.0)
    expected = []
    if text or ids:
        delta = pb.Delta(output_index=index, text=text, token_ids=ids, logprobs=_logprobs(rows))
        expected.append(pb.GenerateResponse(delta=delta))
    if ending is not None:
        reason, by, is_eos = ending
        finished = pb.Finished(output_index=index, output_tokens=len(ids))
        finished.reason = pb.FINISH_REASON_STOP if reason == "stop" else pb.FINISH_REASON_LENGTH
        if isinstance(by, str):
            finished.stop_string = by
        elif by is not None:
            setattr(finished, "eos_token_id" if is_eos else "stop_token_id", by)
        expected.append(pb.GenerateResponse(finished=finished))
    assert stream.take() == [message.SerializeToString() for message in expected]


def _duration(seconds: float) -> tuple[int, int]:
    return divmod(max(0, int(seconds * 1e9)), 10**9)


@given(
    names=st.tuples(_text, _text, _text, _text, _text),
    prompt_tokens=_u32,
    cached=st.none() | st.integers(0, 2**31 - 1),
    position=_u32,
    seed=st.integers(0, 2**64 - 1),
    times=st.lists(st.floats(0, 1e6), min_size=4, max_size=4).map(sorted),
    num_tokens=st.integers(0, 3),
    wait=st.none() | st.floats(0, 1e6),
    rows=st.none() | st.lists(_row, max_size=3),
)
def test_the_other_events(
    names: tuple[str, ...], prompt_tokens: int, cached: int | None, position: int, seed: int,
    times: list[float], num_tokens: int, wait: float | None, rows: list[Any] | None,
) -> None:  # fmt: skip
    request_id, model, engine, deployment, sampler = names
    arrived, dispatched, first, last = times
    stream = make_stream(
        request_id=request_id, model=model, engine=engine, deployment=deployment, sampler=sampler,
        num_prompt_tokens=prompt_tokens, seed=seed, arrived_at=arrived,
    )  # fmt: skip
    pump = Pump()
    key = pump.add(stream, None)
    stream.put_queued(1, None)
    stream.put_queued(position, wait)
    stream.set_dispatched(position, dispatched)
    pump.put_prompt(key, cached, rows, 0.0)
    queued = pb.Queued(request_id=request_id, position=position)
    if wait is not None:
        queued.expected_wait.seconds, queued.expected_wait.nanos = _duration(wait)
        queued.expected_wait.SetInParent()
    started = pb.Started(
        request_id=request_id, model=model, engine=engine, prompt_tokens=prompt_tokens,
        cached_prompt_tokens=cached, deployment=deployment, queue_position=position,
    )  # fmt: skip
    expected = [pb.GenerateResponse(queued=queued), pb.GenerateResponse(started=started)]
    if rows is not None:
        expected.append(pb.GenerateResponse(prompt_logprobs=pb.PromptLogprobs(tokens=_logprobs(rows))))
    assert stream.take() == [message.SerializeToString() for message in expected]

    for at in [first, last, last][:num_tokens]:
        pump.put_made(key, 0, "", [1], None, None, at)
    if not num_tokens:
        first = last = arrived
    elif num_tokens == 1:
        last = first
    summary = pb.Summary(
        usage=pb.Usage(prompt_tokens=prompt_tokens, cached_prompt_tokens=cached, output_tokens=num_tokens),
        seed=seed,
        sampler=sampler,
    )
    pieces = {
        "queue": dispatched - arrived, "first_token": first - arrived, "prefill": first - dispatched,
        "total": last - arrived,
    }  # fmt: skip
    if num_tokens > 1:
        pieces["per_token"] = (last - first) / (num_tokens - 1)
    for name, seconds in pieces.items():
        message = getattr(summary.timings, name)
        message.SetInParent()
        message.seconds, message.nanos = _duration(seconds)
    assert stream.summary() == pb.GenerateResponse(summary=summary).SerializeToString()


@given(state=st.binary(min_size=1, max_size=40), seed=st.integers(0, 2**64 - 1), cached=st.none() | _u32)
def test_a_handoff_ends_the_stream(state: bytes, seed: int, cached: int | None) -> None:
    stream = make_stream(seed=seed, arrived_at=1.0)
    pump = Pump()
    key = pump.add(stream, None)
    pump.put_prompt(key, cached, None, 2.0)
    stream.put_handoff(state, 3.0)
    assert stream.is_over
    pump.step([(key, [97], None, None, None, None)], 4.0)
    started, handoff = (pb.GenerateResponse.FromString(message) for message in stream.take())
    assert started.HasField("started")
    assert handoff == pb.GenerateResponse(handoff=pb.Handoff(state=state, seed=seed))
    summary = pb.GenerateResponse.FromString(stream.summary()).summary
    assert (summary.usage.output_tokens, summary.timings.first_token.seconds) == (0, 2)


def test_a_logprob_keeps_its_bits() -> None:
    stream, pump = make_stream(), Pump()
    pump.put_made(pump.add(stream, None), 0, "", [7], [([7], [-0.1], None)], None, 0.0)
    (message,) = stream.take()
    assert struct.pack("<f", -0.1) in message


_steps = st.lists(
    st.one_of(
        st.just("take"),
        st.lists(
            st.tuples(st.integers(0, 3), st.binary(max_size=3)), max_size=4, unique_by=lambda row: row[0]
        ),
    ),
    max_size=40,
)


@given(_steps)
def test_whatever_the_reader_does_each_output_arrives_whole_and_in_order(steps: list[Any]) -> None:
    stream, pump = make_stream(4), Pump()
    key = pump.add(stream, "owner")
    put: dict[int, list[int]] = defaultdict(list)
    got_ids: dict[int, list[int]] = defaultdict(list)
    got_text: dict[int, str] = defaultdict(str)
    num_waiting = 0

    def take() -> None:
        seen = set()
        for data in stream.take():
            message = pb.GenerateResponse.FromString(data)
            if message.HasField("delta"):
                assert message.delta.output_index not in seen, "more than one delta waited for an output"
                seen.add(message.delta.output_index)
                got_ids[message.delta.output_index] += message.delta.token_ids
                got_text[message.delta.output_index] += message.delta.text

    for step in steps:
        if step == "take":
            take()
            continue
        pump.step([(key + index, list(data), None, None, None, None) for index, data in step], 0.0)
        for index, data in step:
            put[index] += data
        num_waiting, *_ = pump.collect(None)
        assert num_waiting == sum(len(data) for _, data in step)
    pump.step([(key + index, [], "length", None, None, None) for index in range(4)], 0.0)
    _, _, requests, early = pump.collect(None)
    assert early == []
    assert [(owner, happened & Pump.OVER) for owner, happened in requests] == [("owner", Pump.OVER)]
    take()
    for index in range(4):
        assert got_ids[index] == put[index]
        assert got_text[index] == bytes(put[index]).decode(errors="replace")


def test_an_end_survives_merging_and_comes_once() -> None:
    stream, pump = make_stream(), Pump()
    key = pump.add(stream, None)
    pump.step([(key, [97], None, None, (0, None), None)], 0.0)
    pump.step([(key, [98], "length", None, None, None)], 0.0)
    pump.step([(key, [99], "length", None, None, None)], 0.0)
    events = [pb.GenerateResponse.FromString(data) for data in stream.take()]
    assert [event.WhichOneof("event") for event in events] == ["started", "delta", "finished"]
    assert (events[1].delta.text, list(events[1].delta.token_ids)) == ("ab", [97, 98])
    assert stream.take() == []


def test_what_an_engine_does_not_know_of_an_end_is_told() -> None:
    stream, pump = make_stream(2, stop=["bc"]), Pump()
    key = pump.add(stream, "owner")
    pump.step([(key + 1, [97, 98, 99, 100], None, None, None, None)], 0.0)
    num_tokens, _, _, early = pump.collect(None)
    assert (num_tokens, early) == (3, [("owner", 1)])


def test_too_much_that_waits_is_told_and_taking_makes_room() -> None:
    stream, pump = make_stream(max_pending_bytes=100), Pump()
    key = pump.add(stream, "owner")
    for _ in range(5):
        pump.step([(key, [97] * 20, None, None, None, None)], 0.0)
        assert stream.num_pending_bytes == 100
        stream.take()
    pump.step([(key, [97] * 21, None, None, None, None)], 0.0)
    _, _, requests, _ = pump.collect(None)
    assert requests[0][1] & Pump.OVERFLOWED
    assert stream.take() == []


def test_an_empty_take_is_answered_once() -> None:
    stream, pump = make_stream(), Pump()
    key = pump.add(stream, "owner")
    assert stream.take() == []
    pump.step([(key, [97], None, None, None, None)], 0.0)
    pump.step([(key, [98], None, None, None, None)], 0.0)
    assert [h & Pump.AWAITED for _, h in pump.collect(None)[2]] == [Pump.AWAITED]
    pump.step([(key, [99], None, None, None, None)], 0.0)
    assert pump.collect(None)[2] == []


def test_tokens_are_summed_by_tenant_and_removed_requests_are_not_lost() -> None:
    pump = Pump()
    streams = [make_stream() for _ in range(3)]
    keys = [pump.add(s, i, tenant=i % 2, leaves_at=3) for i, s in enumerate(streams)]
    assert len({key >> 8 for key in keys}) == 3
    pump.step([(key, [97] * (i + 1), None, None, None, None) for i, key in enumerate(keys)], 0.0)
    assert pump.remove(keys[1]) == 2
    assert pump.remove(keys[1]) == 0
    num_tokens, tenants, requests, _ = pump.collect(None)
    assert (num_tokens, tenants) == (4, [(0, 4)])
    assert [owner for owner, happened in requests if happened & Pump.LEAVING] == [2]
    again = pump.add(make_stream(), "again")
    pump.step([(keys[1], [97], None, None, None, None)], 0.0)
    assert pump.collect(None)[0] == 0, "a key is never given again"
    assert pump.remove(again) == 0


@pytest.mark.parametrize(
    "row",
    [
        (1, [97]), ("x", [97], None, None, None, None), (1, [-1], None, None, None, None),
        (1, [97], "over", None, None, None), (1, [97], None, None, None, [([1], [], 1)]),
        (1, [97], None, None, None, [([1], [0.0], 1), ([1, 2], [0.0, 0.0], 1)]), (1, [97], None, [], None, None),
    ],
)  # fmt: skip
def test_wrong_rows_are_refused_whole(row: Any) -> None:
    stream, pump = make_stream(), Pump()
    key = pump.add(stream, None)
    with pytest.raises((TypeError, ValueError, OverflowError)):
        pump.step([(key, [97], None, None, None, None), row], 0.0)
    assert pump.collect(None)[0] == 0


def test_a_native_step_wakes_whoever_watches_the_descriptor_once() -> None:
    descriptor = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        stream, pump = make_stream(), Pump(descriptor)
        key = pump.add(stream, "owner")
        for _ in range(2):
            pump.step([(key, [97], None, None, None, None)], 0.0)
        assert os.eventfd_read(descriptor) == 1
        pump.collect(None)
        pump.step([(key + 256, [97], None, None, None, None)], 0.0)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(descriptor)
        pump.step([(key, [97], None, None, None, None)], 0.0)
        assert os.eventfd_read(descriptor) == 1
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("finish", ["failed", "aborted"])
def test_an_irregular_end_fails_the_request(finish: Any) -> None:
    stream, pump = make_stream(), Pump()
    key = pump.add(stream, "owner")
    pump.step([(key, [97], finish, None, None, None)], 0.0)
    assert [happened & Pump.FAILED for _, happened in pump.collect(None)[2]] == [Pump.FAILED]
    assert not stream.is_over


def test_the_prompt_is_told_once_whatever_the_number_of_outputs() -> None:
    stream, pump = make_stream(2), Pump()
    key = pump.add(stream, "owner")
    pump.step([(key + i, [97], None, None, (i, None), None) for i in range(2)], 0.0)
    events = [pb.GenerateResponse.FromString(data) for data in stream.take()]
    assert [event.WhichOneof("event") for event in events] == ["started", "delta", "delta"]
    assert events[0].started.cached_prompt_tokens == 0
