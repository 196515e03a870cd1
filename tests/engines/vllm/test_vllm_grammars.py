"""A grammar that turns out to cost seconds a token ends its own request, and nobody else waits for it."""

from __future__ import annotations

import pytest
import torch

xgrammar = pytest.importorskip("xgrammar")
pytest.importorskip("vllm")

from twinjet.engines.tensorrt_llm.worker.grammar import Matcher  # noqa: E402
from twinjet.engines.vllm.core.grammars import WatchedGrammar  # noqa: E402
from twinjet.grammar.effort import START_S, STEP_S, Effort  # noqa: E402

TOKENS = [b"", b"a", b"aaaaaaaa", b"b", b"x"]
EIGHT = 2


def _matched(regex: str) -> WatchedGrammar:
    info = xgrammar.TokenizerInfo(
        TOKENS, vocab_type=xgrammar.VocabType.RAW, vocab_size=len(TOKENS), stop_token_ids=[0]
    )
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    compiled = compiler.compile_regex(regex)
    return WatchedGrammar(matcher=xgrammar.GrammarMatcher(compiled), vocab_size=len(TOKENS), ctx=compiled)


def test_an_ambiguous_grammar_ends_its_request_before_it_takes_long() -> None:
    grammar = _matched("((((a{1,1000}){1,1000}){1,1000}){1,1000})")
    bitmask = xgrammar.allocate_token_bitmask(2, len(TOKENS))
    num_tokens = 0
    while True:
        grammar.fill_bitmask(bitmask, 1)
        if not grammar.accept_tokens("r", [EIGHT]):
            break
        num_tokens += 1
        assert num_tokens < 40, "each token takes longer than all before"
    assert grammar.effort.is_spent()
    bitmask.fill_(-1)
    grammar.fill_bitmask(bitmask, 1)
    assert bitmask.tolist() == [[-1], [0]], "no token is left to it, and no other row is touched"
    assert not grammar.accept_tokens("r", [EIGHT])


def test_the_other_engines_matcher_does_the_same() -> None:
    compiled = _matched("((((a{1,1000}){1,1000}){1,1000}){1,1000})").ctx
    matcher = Matcher(xgrammar, compiled, len(TOKENS))
    num_tokens = 0
    while True:
        mask = matcher.bitmask()
        assert mask is not None, "the grammar goes on"
        if not mask.any():
            break
        assert matcher.accept(EIGHT)
        num_tokens += 1
        assert num_tokens < 40, "each token takes longer than all before"


def test_a_plain_grammar_goes_on_as_vllms_does() -> None:
    grammar = _matched("x(a|b)*")
    bitmask = xgrammar.allocate_token_bitmask(1, len(TOKENS))
    grammar.fill_bitmask(bitmask, 0)
    assert int(bitmask[0, 0]) & 0b11111 == 0b10000
    assert grammar.accept_tokens("r", [4])
    for _ in range(300):
        grammar.fill_bitmask(bitmask, 0)
        assert int(bitmask[0, 0]) & 0b11111 == 0b01111
        assert grammar.accept_tokens("r", [EIGHT])
    assert not grammar.accept_tokens("r", [4]), "the grammar itself refuses it"
    assert isinstance(bitmask, torch.Tensor)


def test_effort_grows_with_the_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    effort, clock = Effort(), [0.0]
    monkeypatch.setattr("twinjet.grammar.effort.time.thread_time", lambda: clock[0])

    def take(seconds: float) -> None:
        with effort.counted():
            clock[0] += seconds

    for _ in range(1000):
        effort.allow_mask()
        take(0.99 * STEP_S)
    assert not effort.is_spent()
    take(START_S)
    take(11 * STEP_S)
    assert effort.is_spent()
