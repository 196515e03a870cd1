"""Our filters and penalties beside vLLM's own functions: the table of docs/sampler.md, executed."""

import warnings
from typing import Any

import numpy as np
import pytest

from twinjet.sampling import Request, Sampler

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from vllm.model_executor.layers.utils import apply_penalties
    from vllm.v1.sample.logits_processor.builtin import MinPLogitsProcessor
    from vllm.v1.sample.ops.bad_words import apply_bad_words
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

VOCAB = 2000


def kept_by_us(row: np.ndarray, **options: Any) -> np.ndarray:
    logprobs = (
        Sampler(1)
        .sample(row, [Request(len(row), **options)], num_logprobs=len(row), logprobs_mode="processed")
        .logprobs
    )
    assert logprobs is not None
    kept = np.zeros(len(row), bool)
    kept[logprobs.token_ids[0, 1:]] = logprobs.logprobs[0, 1:] > -np.inf
    return kept


def probabilities(row: np.ndarray) -> np.ndarray:
    p = np.exp(row.astype(np.float64) - row.max())
    return p / p.sum()


def rows() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [
        (scale * rng.standard_normal(VOCAB)).astype(np.float32)
        for scale in (0.5, 1, 2, 4, 8)
        for _ in range(6)
    ]


@pytest.mark.parametrize("k", [1, 2, 10, 50, 1999])
def test_top_k_keeps_what_vllm_keeps(k: int) -> None:
    for row in [*rows(), np.round(rows()[6] * 2) / 2]:  # the last has ties at every boundary
        theirs = apply_top_k_top_p_pytorch(torch.from_numpy(row.copy())[None], torch.tensor([k]), None, True)
        assert (kept_by_us(row, top_k=k) == (theirs[0] > -np.inf).numpy()).all()


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("k", [None, 100])
def test_top_p_keeps_what_vllm_keeps(p: float, k: int | None) -> None:
    for row in rows():
        tensor_k = None if k is None else torch.tensor([k])
        theirs = apply_top_k_top_p_pytorch(torch.from_numpy(row.copy())[None], tensor_k, torch.tensor([p]))
        ours = kept_by_us(row, top_p=p, top_k=k or 0)
        exact = probabilities(row)
        if k:
            exact[row < np.sort(row)[-k]] = 0
            exact /= exact.sum()
        order = np.argsort(-exact, kind="stable")
        above = np.empty(VOCAB)
        above[order] = np.cumsum(exact[order]) - exact[order]
        clear = np.abs(above - np.float32(p)) > 1e-5  # float32 sums of vLLM decide the rest
        assert (ours == (theirs[0] > -np.inf).numpy())[clear].all()
        assert clear.sum() > VOCAB - 100 or p > 0.99


@pytest.mark.parametrize("min_p", [0.001, 0.05, 0.5, 1.0])
def test_min_p_keeps_what_vllm_keeps(min_p: float) -> None:
    processor = MinPLogitsProcessor.__new__(MinPLogitsProcessor)
    processor.min_p_count, processor.min_p = 1, torch.tensor([[min_p]])
    for row in rows():
        theirs = processor.apply(torch.from_numpy(row.copy())[None])[0]
        exact = probabilities(row)
        clear = np.abs(exact / exact.max() / min_p - 1) > 1e-5
        clear |= row == row.max()
        assert (kept_by_us(row, min_p=min_p) == (theirs > -np.inf).numpy())[clear].all()


@pytest.mark.parametrize("seed", range(20))
def test_penalised_logits_equal_vllms(seed: int) -> None:
    rng = np.random.default_rng(seed)
    row = (4 * rng.standard_normal(VOCAB)).astype(np.float32)
    prompt, output = rng.integers(0, VOCAB, 80), rng.integers(0, 200, 300)
    repetition, frequency, presence = (float(np.float32(v)) for v in rng.uniform([0.5, -2, -2], [2, 2, 2]))
    theirs = apply_penalties(
        torch.from_numpy(row.copy())[None],
        torch.from_numpy(prompt)[None],
        torch.from_numpy(output)[None],
        torch.tensor([presence]),
        torch.tensor([frequency]),
        torch.tensor([repetition]),
    )[0].numpy()
    ours = np.empty((1, VOCAB), np.float32)
    request = Request(
        VOCAB,
        repetition_penalty=repetition,
        frequency_penalty=frequency,
        presence_penalty=presence,
        prompt_token_ids=prompt,
        output_token_ids=output,
    )
    Sampler(1).sample(row, [request], processed_logits=ours)
    assert ours[0].tobytes() == theirs.tobytes()


@pytest.mark.parametrize("output", [[], [1], [1, 2], [5, 1, 2], [2, 1]])
def test_bad_words_ban_what_vllm_bans(output: list[int]) -> None:
    words = [[3], [1, 2], [1, 2, 7], [5, 1, 2, 8]]
    theirs = torch.zeros(1, 10)
    apply_bad_words(theirs, {0: words}, [output])
    ours = np.empty((1, 10), np.float32)
    Sampler(1).sample(
        np.zeros(10, np.float32),
        [Request(10, bad_words=words, output_token_ids=output)],
        processed_logits=ours,
    )
    assert (np.isinf(ours[0]) == torch.isinf(theirs[0]).numpy()).all()
