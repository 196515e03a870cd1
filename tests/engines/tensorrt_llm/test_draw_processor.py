"""The logits processor: forced tokens, lag, faults, reports, and life in another process."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import multiprocessing
import pickle
from typing import Any

import pytest
import torch

from twinjet.engines.fixed_logits import fixed_logits
from twinjet.engines.tensorrt_llm.front.channel import (
    FaultReported,
    Inbox,
    ReportChannel,
    ReportLost,
)
from twinjet.engines.tensorrt_llm.worker.logits import DrawProcessor, DrawSettings
from twinjet.engines.tensorrt_llm.worker.reports import TokenReport
from twinjet.sampling import Request, Sampler

VOCAB = 258
PROMPT = [257, 72, 105]


def settings(channel: ReportChannel, key: int, **changes: Any) -> DrawSettings:
    base = DrawSettings(
        key=key, report_path=channel.path, vocab_size=VOCAB, num_prompt_tokens=len(PROMPT), output_index=0,
        seed=11, temperature=0.9, top_p=0.95, top_k=40, min_p=0.0, repetition_penalty=1.2,
        frequency_penalty=0.1, presence_penalty=0.0, logit_bias={97: 1.0}, allowed_token_ids=(), bad_text=None,
        min_tokens=0, max_tokens=16, end_token_ids=(256,), fault_token_id=256, num_logprobs=2,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def drive(processor: DrawProcessor, num_steps: int, *, lag: int, padding: int = 0) -> list[int]:
    """Call it as the engine does and take what it forces."""
    tokens: list[int] = []
    for _ in range(num_steps):
        logits = torch.full((1, 1, VOCAB + padding), 50.0)
        logits[0, 0, :VOCAB] = torch.from_numpy(fixed_logits(PROMPT + tokens, VOCAB))
        shown = tokens[: max(0, len(tokens) - lag)]
        processor(999, logits, [PROMPT + shown], None, None)
        row = logits.reshape(-1)
        forced = int(row.argmax())
        assert row[forced] == 0
        assert bool((row == -math.inf).sum() == row.numel() - 1), "every other token is inadmissible"
        tokens.append(forced)
    return tokens


def expected(num_steps: int, **changes: Any) -> list[int]:
    """The same draw by the sampler alone."""
    request = Request(
        VOCAB, temperature=0.9, top_p=0.95, top_k=40, repetition_penalty=1.2, frequency_penalty=0.1, seed=11,
        prompt_token_ids=PROMPT, logit_bias={97: 1.0}, stop_token_ids=(256,), **changes,
    )  # fmt: skip
    tokens: list[int] = []
    for _ in range(num_steps):
        row = fixed_logits(PROMPT + tokens, VOCAB)
        tokens.append(int(Sampler(num_threads=1).sample(row, [request]).token_ids[0]))
    return tokens


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("padding", [0, 6])
async def test_draws_as_the_sampler_whatever_is_shown(channel: ReportChannel, lag: int, padding: int) -> None:
    key, _ = channel.open()
    drawn = drive(DrawProcessor(settings(channel, key)), 16, lag=lag, padding=padding)
    assert drawn == expected(16)


async def test_reports_every_token_with_logprobs(channel: ReportChannel) -> None:
    key, inbox = channel.open()
    drawn = drive(DrawProcessor(settings(channel, key)), 5, lag=1)
    reports = [await inbox.take(i, 5.0) for i in range(5)]
    assert [r.token_id for r in reports] == drawn
    raw = torch.log_softmax(torch.from_numpy(fixed_logits(PROMPT, VOCAB)).double(), -1)
    assert reports[0].entries[0][1] == pytest.approx(float(raw[drawn[0]]), abs=1e-4)
    assert [token for token, _ in reports[0].entries[1:]] == raw.topk(2).indices.tolist()


async def test_without_logprobs_reports_only_what_ends_the_output(channel: ReportChannel) -> None:
    key, inbox = channel.open()
    drawn = drive(DrawProcessor(settings(channel, key, num_logprobs=None, max_tokens=4)), 4, lag=1)
    assert (await inbox.take(3, 5.0)).token_id == drawn[3]
    with pytest.raises(ReportLost):
        await inbox.take(2, 0.05)


async def test_starts_anew_after_pickling(channel: ReportChannel) -> None:
    key, _ = channel.open()
    processor = DrawProcessor(settings(channel, key))
    first = drive(processor, 4, lag=1)
    copy = pickle.loads(pickle.dumps(processor))
    assert drive(copy, 4, lag=1) == first


def _in_worker(pickled: bytes, sender: Any) -> None:
    sender.send(drive(pickle.loads(pickled), 6, lag=1))
    sender.close()


async def test_draws_and_reports_from_other_processes(channel: ReportChannel) -> None:
    """Two ranks in processes of their own: the same tokens, one report of each."""
    key, inbox = channel.open()
    pickled = pickle.dumps(DrawProcessor(settings(channel, key)))
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    ranks = [context.Process(target=_in_worker, args=(pickled, sender)) for _, sender in pipes]
    for rank in ranks:
        rank.start()
    try:
        reports = [(await inbox.take(i, 60.0)).token_id for i in range(6)]
        drawn = [await asyncio.to_thread(receiver.recv) for receiver, _ in pipes]
    finally:
        for rank, (receiver, sender) in zip(ranks, pipes, strict=True):
            await asyncio.to_thread(rank.join)
            receiver.close()
            sender.close()
    assert drawn == [reports, reports]
    assert inbox.num_disagreements == 0


async def test_ranks_that_disagree_are_a_fault() -> None:
    inbox = Inbox()
    inbox.put(0, TokenReport(5, 1, ()))
    inbox.put(0, TokenReport(6, 1, ()))
    assert inbox.num_disagreements == 1
    with pytest.raises(FaultReported, match="different tokens"):
        await inbox.take(1, 1.0)


@pytest.mark.parametrize(
    ("shown", "message"),
    [
        ([[*PROMPT, 1, 2, 3]], "shows 3 output tokens where 2"),
        ([PROMPT], "shows 0 output tokens where 2"),
        ([[*PROMPT, 1]], "kept token 1"),
        ([PROMPT, PROMPT], "beam search"),
        ([PROMPT[:1]], "shows -2"),
    ],
)
async def test_a_sequence_that_does_not_fit_is_a_fault(
    channel: ReportChannel, shown: list[list[int]], message: str
) -> None:
    key, inbox = channel.open()
    processor = DrawProcessor(settings(channel, key))
    drive(processor, 2, lag=0)
    logits = torch.zeros(1, 1, VOCAB)
    processor(0, logits, shown, None, None)
    assert int(logits.argmax()) == 256, "a fault forces the end token"
    with pytest.raises(FaultReported, match=message):
        await inbox.take(99, 5.0)
    processor(0, logits, [PROMPT], None, None)
    assert int(logits.argmax()) == 256, "and goes on doing so"


async def test_a_row_without_an_admissible_token_is_a_fault(channel: ReportChannel) -> None:
    key, inbox = channel.open()
    processor = DrawProcessor(settings(channel, key))
    logits = torch.full((1, 1, VOCAB), -math.inf)
    processor(0, logits, [PROMPT], None, None)
    assert int(logits.argmax()) == 256
    with pytest.raises(FaultReported, match="no token is admissible"):
        await inbox.take(0, 5.0)


async def test_no_exception_leaves_it(channel: ReportChannel) -> None:
    key, inbox = channel.open()
    processor = DrawProcessor(settings(channel, key, top_k=-5))
    processor(0, torch.zeros(1, 1, VOCAB), [PROMPT], None, None)
    with pytest.raises(FaultReported):
        await inbox.take(0, 5.0)


async def test_an_unreachable_server_does_not_hurt_the_worker(channel: ReportChannel) -> None:
    lost = settings(channel, 1, report_path="/nonexistent/reports")
    assert drive(DrawProcessor(lost), 4, lag=1) == expected(4)
