"""What the sampler takes, refuses, and does with rows that have no answer."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from twinjet import sampling
from twinjet.sampling import STATUS_INFINITE, STATUS_NAN, STATUS_NO_TOKEN, Request, Sampler

torch = pytest.importorskip("torch")


class OnMetal:
    """Logits that claim to live where neither half of the sampler can read them."""

    shape = (1, 10)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 8, 0

    def __dlpack__(self, **_: object) -> object:
        raise AssertionError("must not be read")


@pytest.fixture
def sampler() -> Sampler:
    return Sampler(2)


def requests(count: int, vocab_size: int, **options: object) -> list[Request]:
    return [Request(vocab_size, seed=i, **options) for i in range(count)]  # type: ignore[arg-type]


def test_numpy_and_torch_give_the_same(sampler: Sampler) -> None:
    x = np.random.default_rng(0).standard_normal((4, 1000)).astype(np.float32)
    from_numpy = sampler.sample(x, requests(4, 1000)).token_ids
    from_torch = sampler.sample(torch.from_numpy(x), requests(4, 1000)).token_ids
    assert from_numpy.tolist() == from_torch.tolist()
    assert from_numpy.dtype == np.int32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_types_equal_their_widening(sampler: Sampler, dtype: str) -> None:
    narrow = (3 * torch.randn(5, 777, generator=torch.Generator().manual_seed(1))).to(getattr(torch, dtype))
    wide = sampler.sample(narrow.float(), requests(5, 777, top_p=0.9)).token_ids
    assert sampler.sample(narrow, requests(5, 777, top_p=0.9)).token_ids.tolist() == wide.tolist()
    if dtype == "bfloat16":
        bits = narrow.view(torch.int16).numpy()
        drawn = sampler.sample(bits, requests(5, 777, top_p=0.9), dtype="bfloat16").token_ids
        assert drawn.tolist() == wide.tolist()


def test_rows_need_not_touch_each_other(sampler: Sampler) -> None:
    x = np.random.default_rng(0).standard_normal((8, 600)).astype(np.float32)
    strided = x[::-2, 100:400]
    copy = np.ascontiguousarray(strided)
    expected = sampler.sample(copy, requests(4, 300)).token_ids.tolist()
    assert sampler.sample(strided, requests(4, 300)).token_ids.tolist() == expected
    assert sampler.sample(copy[1], requests(2, 300)[1:]).token_ids[0] == expected[1]


def test_logits_are_not_changed(sampler: Sampler) -> None:
    x = np.random.default_rng(0).standard_normal((2, 500)).astype(np.float32)
    x[1, 3] = np.nan
    x[1, 4] = np.inf
    before = x.tobytes()
    x.flags.writeable = False
    sampler.sample(x, requests(2, 500, repetition_penalty=2.0, prompt_token_ids=[1, 2], logit_bias={5: 3.0}))
    assert x.tobytes() == before


@pytest.mark.parametrize(
    ("logits", "error", "text"),
    [
        (np.zeros((1, 10)), TypeError, "element type"),
        (np.zeros((1, 10), np.int32), TypeError, "element type"),
        (np.zeros((1, 1, 10), np.float32), ValueError, "dimensions"),
        (np.zeros((1, 11), np.float32), ValueError, "vocab_size"),
        (np.zeros((1, 20), np.float32)[:, ::2], ValueError, "stride"),
        (np.zeros((2, 10), np.float32), ValueError, "one per row"),
        (np.zeros((1, 0), np.float32), ValueError, "columns"),
        (np.zeros((1, 524289), np.float32), ValueError, "columns"),
        (np.zeros(41, np.uint8)[1:].view(np.float32)[None], ValueError, "aligned"),
        ([[0.0] * 10], TypeError, "must be a numpy array"),
        (torch.zeros(1, 10, dtype=torch.float64), TypeError, "element type"),
        (torch.zeros(1, 20)[:, ::2], ValueError, "stride"),
        (torch.zeros(1, 10, device="meta"), ValueError, "meta"),
        (OnMetal(), ValueError, "must be on the CPU"),
    ],
)
def test_wrong_logits_are_refused(sampler: Sampler, logits: object, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        sampler.sample(logits, requests(1, 10))


@pytest.mark.parametrize(
    ("output", "error"),
    [
        (np.zeros((1, 9), np.float32), ValueError),
        (np.zeros((2, 10), np.float32), ValueError),
        (np.zeros((1, 20), np.float32)[:, ::2], ValueError),
        (np.zeros((1, 10), np.float64), TypeError),
        (np.zeros((1, 10), np.uint32), TypeError),
        (OnMetal(), TypeError),
    ],
)
def test_wrong_outputs_are_refused(sampler: Sampler, output: object, error: type) -> None:
    request = Request(10)
    with pytest.raises(error, match="processed_logits"):
        sampler.sample(np.zeros((1, 10), np.float32), [request], processed_logits=output)
    assert request.num_output_tokens == 0


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": float("nan")},
        {"temperature": -0.5},
        {"temperature": float("inf")},
        {"temperature": 1e300},
        {"top_p": float("nan")},
        {"top_p": float("inf")},
        {"min_p": float("nan")},
        {"repetition_penalty": float("nan")},
        {"frequency_penalty": float("-inf")},
        {"min_p": float("inf")},
        {"top_k": -2},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("inf")},
        {"frequency_penalty": float("nan")},
        {"presence_penalty": float("inf")},
        {"seed": -1},
        {"seed": 2**64},
        {"output_index": 2**32},
        {"position_offset": -1},
        {"logit_bias": {10: 1.0}},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {1: float("inf")}},
        {"allowed_token_ids": [10]},
        {"bad_words": [[]]},
        {"bad_words": [[2**40]]},
        {"stop_token_ids": [99]},
        {"min_tokens": -1},
        {"output_token_ids": [10]},
    ],
)
def test_wrong_parameters_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must"):
        Request(10, **options)  # type: ignore[arg-type]


def test_lenient_values_mean_what_is_written(sampler: Sampler) -> None:
    x = np.array([[1.0, 3.0, 3.0, 2.0]], np.float32)

    def kept(**options: float) -> list[int]:
        logprobs = sampler.sample(
            x,
            [Request(4, **options)],
            num_logprobs=4,
            logprobs_mode="processed",  # type: ignore[arg-type]
        ).logprobs
        assert logprobs is not None
        return sorted(
            int(i)
            for i, p in zip(logprobs.token_ids[0, 1:], logprobs.logprobs[0, 1:], strict=True)
            if p > -np.inf
        )

    assert (
        kept(top_k=99)
        == kept(top_k=0)
        == kept(top_k=-1)
        == kept(top_p=2.0)
        == kept(min_p=-1.0)
        == [0, 1, 2, 3]
    )
    assert kept(top_p=0.0) == kept(top_p=-3.0) == kept(min_p=7.0) == kept(top_k=1) == [1, 2]
    assert sampler.sample(x, [Request(4, temperature=0.0)]).token_ids[0] == 1
    assert sampler.sample(x, [Request(4, top_k=1, seed=5)]).token_ids[0] == 1


def test_a_row_without_a_token_leaves_its_neighbours_alone(sampler: Sampler) -> None:
    x = np.random.default_rng(0).standard_normal((4, 50)).astype(np.float32)
    expected = sampler.sample(x, requests(4, 50)).token_ids.tolist()
    x[1] = -np.inf
    x[2] = np.nan
    batch = requests(4, 50)
    result = sampler.sample(x, batch, num_logprobs=2)
    assert result.token_ids.tolist() == [expected[0], -1, -1, expected[3]]
    assert result.status.tolist() == [0, STATUS_NO_TOKEN, STATUS_NO_TOKEN | STATUS_NAN, 0]
    assert [r.num_output_tokens for r in batch] == [1, 0, 0, 1]
    assert result.logprobs is not None
    assert result.logprobs.ranks[1] == 0
    assert (result.logprobs.token_ids[1:3] == -1).all()


def test_infinite_logits_share_the_row(sampler: Sampler) -> None:
    x = np.zeros((1, 50), np.float32)
    x[0, [7, 9]] = np.inf
    seen = set()
    for seed in range(60):
        result = sampler.sample(x, [Request(50, seed=seed)])
        assert result.status[0] == STATUS_INFINITE
        seen.add(int(result.token_ids[0]))
    assert seen == {7, 9}


def test_min_tokens_yields_when_nothing_else_is_left(sampler: Sampler) -> None:
    x = np.zeros((1, 8), np.float32)
    request = Request(8, min_tokens=3, stop_token_ids=[2], allowed_token_ids=[2])
    assert sampler.sample(x, [request]).token_ids[0] == 2
    request = Request(8, min_tokens=3, stop_token_ids=[2], allowed_token_ids=[2, 5])
    assert sampler.sample(x, [request]).token_ids[0] == 5


def test_bitmask_rows(sampler: Sampler) -> None:
    x = np.zeros((3, 70), np.float32)
    words = np.zeros((2, 3), np.int32)
    words[0, 2] = 1 << 5  # token 69
    words[1, 0] = np.int32(-(2**31))  # token 31
    rows = np.array([1, -1, 0], np.int32)
    tokens = sampler.sample(x, requests(3, 70), bitmask=words, bitmask_rows=rows).token_ids
    assert tokens[0] == 31
    assert tokens[2] == 69
    assert sampler.sample(x[:2], requests(2, 70), bitmask=torch.from_numpy(words)).token_ids.tolist() == [
        69,
        31,
    ]
    for bad in (words[:, :2], words.astype(np.int64), words[:1]):
        with pytest.raises((TypeError, ValueError)):
            sampler.sample(x, requests(3, 70), bitmask=bad)
    with pytest.raises(ValueError, match="bitmask_rows"):
        sampler.sample(x, requests(3, 70), bitmask=words, bitmask_rows=np.array([0, 1, 2], np.int32))


def test_a_request_may_be_in_a_batch_once(sampler: Sampler) -> None:
    request = Request(5)
    with pytest.raises(ValueError, match="twice"):
        sampler.sample(np.zeros((2, 5), np.float32), [request, request])
    assert sampler.sample(np.zeros((1, 5), np.float32), [request]).status[0] == 0


def test_advance_chooses_rows(sampler: Sampler) -> None:
    batch = requests(3, 9)
    x = np.zeros((3, 9), np.float32)
    sampler.sample(x, batch, advance=np.array([True, False, True]))
    assert [r.position for r in batch] == [1, 0, 1]
    sampler.sample(x, batch, advance=False)
    assert [r.position for r in batch] == [1, 0, 1]


def test_an_empty_batch(sampler: Sampler) -> None:
    result = sampler.sample(np.zeros((0, 9), np.float32), [], num_logprobs=1)
    assert result.token_ids.shape == (0,)


def test_threads_may_share_a_sampler(sampler: Sampler) -> None:
    x = np.random.default_rng(0).standard_normal((16, 5000)).astype(np.float32)
    expected = sampler.sample(x, requests(16, 5000)).token_ids.tolist()
    results: list[list[int]] = []
    threads = [
        threading.Thread(
            target=lambda: results.append(sampler.sample(x, requests(16, 5000)).token_ids.tolist())
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 4


@pytest.mark.parametrize("target", sampling.cpu_targets())
def test_the_target_can_be_forced(target: str) -> None:
    code = "from twinjet.sampling import Sampler, cpu_target; print(cpu_target(), Sampler().target)"
    environment = {**os.environ, "TWINJET_CPU_TARGET": target}
    output = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert output.stdout.split() == [target, target]


def test_an_unknown_target_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWINJET_CPU_TARGET", "mmx")
    with pytest.raises(ValueError, match="TWINJET_CPU_TARGET is mmx"):
        Sampler()
    with pytest.raises(ValueError, match="target is sse"):
        Sampler(1, "sse")


def test_token_lists_are_read_alike_however_they_are_held() -> None:
    held = ([5, 3], (5, 3), np.array([5, 3], np.uint16), [np.int64(5), np.int32(3)], range(5, 2, -2))
    for tokens in held:
        request = Request(8, allowed_token_ids=tokens)
        assert request.banned_token_ids().tolist() == [0, 1, 2, 4, 6, 7]
    for tokens in ([5, 1 << 40], (5, 1 << 62), np.array([5, 1 << 40])):
        with pytest.raises(ValueError, match=r"allowed token is -1: must be in \[0, 8\)"):
            Request(8, allowed_token_ids=tokens)
    for tokens in ([5, 3.0], [True], ["5"], [5, 1 << 70], [[5]], "5", 5):
        with pytest.raises(TypeError, match="allowed_token_ids must"):
            Request(8, allowed_token_ids=tokens)
