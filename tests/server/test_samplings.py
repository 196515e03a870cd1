"""What is kept of sampling parameters means what converting and checking them anew would give."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from twinjet.engines.base import EngineInfo
from twinjet.engines.fake import FakeEngine
from twinjet.errors import InvalidRequest, TwinjetError
from twinjet.request import Sampling, SamplingOverrides, resolve_sampling
from twinjet.server import convert, samplings
from twinjet.server.samplings import Samplings
from twinjet.v1 import sampling_pb2

_FAKE = FakeEngine(options={"max_context_tokens": 100}).describe()
_INFOS = [
    _FAKE,
    replace(_FAKE, default_sampling=SamplingOverrides(temperature=0.5, max_tokens=30, seed=9)),
    replace(_FAKE, limits=replace(_FAKE.limits, max_context_tokens=50)),
    replace(_FAKE, capabilities=_FAKE.capabilities - {"min_p", "logprobs"}),
]


@st.composite
def _messages(draw: st.DrawFn) -> sampling_pb2.SamplingParams:
    message = sampling_pb2.SamplingParams()
    for name, values in (
        ("temperature", st.sampled_from([0.0, 0.7, 500.0])), ("min_p", st.sampled_from([0.0, 0.1])),
        ("seed", st.integers(0, 5)), ("max_tokens", st.integers(0, 110)), ("min_tokens", st.integers(0, 110)),
        ("n", st.integers(1, 3)), ("logprobs", st.integers(0, 3)), ("ignore_eos", st.booleans()),
    ):  # fmt: skip
        if (value := draw(st.none() | values)) is not None:
            setattr(message, name, value)
    message.stop.extend(draw(st.lists(st.sampled_from(["", "end"]), max_size=1)))
    return message


def _result(resolve: object, *arguments: object, **more: object) -> Sampling | tuple[type, str]:
    try:
        return resolve(*arguments, **more)  # type: ignore[operator, no-any-return]
    except TwinjetError as error:
        return type(error), str(error)


@given(
    st.lists(_messages(), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from(_INFOS), st.integers(1, 99)), max_size=8),
)
def test_a_kept_wish_resolves_as_a_new_one(
    messages: list[sampling_pb2.SamplingParams], requests: list[tuple[int, EngineInfo, int]]
) -> None:
    kept = Samplings()
    for i, (which, info, num_prompt_tokens) in enumerate(requests):
        message = messages[which % len(messages)]
        wish = kept.wish(message)
        numbers = {"num_prompt_tokens": num_prompt_tokens, "seed": 1000 + i}
        overrides = convert.sampling_overrides(message)
        assert wish.overrides == overrides
        assert _result(wish.resolve, info, **numbers) == _result(resolve_sampling, overrides, info, **numbers)


def test_equal_messages_are_converted_once_and_large_ones_are_not_kept() -> None:
    kept = Samplings()
    small, large = sampling_pb2.SamplingParams(top_k=3), sampling_pb2.SamplingParams(stop=["x" * 600])
    assert kept.wish(small) is kept.wish(sampling_pb2.SamplingParams(top_k=3))
    assert kept.wish(large) is not kept.wish(large)


def test_an_empty_constraint_is_refused_every_time() -> None:
    kept, message = Samplings(), sampling_pb2.SamplingParams(constraint=sampling_pb2.Constraint())
    assert [_result(kept.wish, message)[0] for _ in range(2)] == [InvalidRequest] * 2  # type: ignore[index]


def test_clients_that_never_repeat_themselves_do_not_fill_the_memory() -> None:
    kept = Samplings()
    for seed in range(3 * samplings.MAX_KEPT):
        kept.wish(sampling_pb2.SamplingParams(seed=seed))
    assert len(kept._kept) <= samplings.MAX_KEPT
