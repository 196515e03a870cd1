"""The sampler that keeps requests on the device against the CPU's, bit for bit, over whole sequences.

    PYTHONPATH=python python tests/gpu/seat_sampler.py [--rows 200000] [--seed 1]

Needs torch with CUDA and the extension with its CUDA side. Requests of all parameters enter, draw, are drawn
for by another sampler, rolled back and leave, in batches of changing size, some rows under a grammar's mask; each
step's tokens, statuses and logprobs are compared with the CPU's on the same logits, and so is what banned strings leave
of another sampler's. Prints the number of differences and how often the
host waited; exits 1 if anything differs, or if it waited in a step that has to wait for nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from twinjet import _core
from twinjet._core import BadText, TokenTexts, Vocabulary
from twinjet.sampling import STATUS_NO_TOKEN, Request, Sampler

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
MAX_ROWS = 64


class Copies:
    """One sequence as the device has it and as the CPU has it."""

    def __init__(
        self, rng: np.random.Generator, vocab_size: int, output: list[int], bad_text: BadText | None
    ) -> None:
        self.options = _options(rng, vocab_size) | {"bad_text": bad_text}
        self.vocab_size = vocab_size
        self.host = Request(vocab_size, **self.options, output_token_ids=output)

    def fresh(self) -> Request:
        return Request(self.vocab_size, **self.options, output_token_ids=self.host.output_token_ids)


def _options(rng: np.random.Generator, vocab_size: int) -> dict[str, Any]:
    def tokens(most: int) -> list[int]:
        return rng.integers(0, vocab_size, rng.integers(0, most + 1)).tolist()

    def maybe(chance: float, value: Any, otherwise: Any) -> Any:
        return value if rng.random() < chance else otherwise

    return {
        "temperature": float(rng.choice([0.0, 0.7, 1.0, 1.5])),
        "top_k": int(rng.choice([0, 1, 5, 50, 2000])),
        "top_p": float(rng.choice([1.0, 0.95, 0.5])),
        "min_p": float(rng.choice([0.0, 0.0, 0.05])),
        "repetition_penalty": float(rng.choice([1.0, 1.0, 1.2])),
        "frequency_penalty": float(rng.choice([0.0, 0.0, 0.3])),
        "presence_penalty": float(rng.choice([0.0, 0.0, 0.2])),
        "seed": int(rng.integers(0, 2**63)),
        "output_index": int(rng.integers(0, 4)),
        "prompt_token_ids": tokens(300),
        "logit_bias": maybe(0.2, dict.fromkeys(tokens(8), 3.0), None),
        "allowed_token_ids": maybe(0.15, tokens(vocab_size // 2), None),
        # The peaks of the logits are low ids: prefixes of these come true.
        "bad_words": maybe(0.4, [rng.integers(0, 6, rng.integers(1, 4)).tolist() for _ in range(6)], None),
        "min_tokens": int(rng.choice([0, 0, 10])),
        "stop_token_ids": rng.integers(0, 6, 2).tolist(),
    }


class Strings:
    """Token texts of three letters, and strings to ban of them, some for several requests."""

    def __init__(self, rng: np.random.Generator, vocab_size: int) -> None:
        self._rng = rng
        texts = [self._text(1, 6) for _ in range(vocab_size - int(rng.integers(0, 5)))]
        # The peaks of the logits are low ids: they make long texts and meet the strings' beginnings.
        texts[:6] = ["a", "b", "c", "ab", "ca", "aa"]
        self._texts = TokenTexts(Vocabulary("byte_level", texts, special=[2, 7, 8]))
        self._last: BadText | None = None

    def _text(self, least: int, most: int) -> str:
        return "".join(self._rng.choice(list("abc"), self._rng.integers(least, most + 1)))

    def bad_text(self) -> BadText | None:
        if self._rng.random() < 0.5:
            return None
        if self._last is None or self._rng.random() < 0.7:
            words = [
                self._text(1, 12 if self._rng.random() < 0.9 else 900)
                for _ in range(self._rng.integers(1, 12))
            ]
            # Strings of a letter or two would leave no token at all.
            words = [word + self._text(3, 3) for word in words]
            self._last = BadText(self._texts, words, skips_special=bool(self._rng.random() < 0.5))
        return self._last


def _check_mask(native: Any, seats: Any, host: list[Request], logits: Any, stream: int) -> int:
    """Rows in which banned strings leave something else of the logits than on the CPU."""
    masked = logits.clone()
    native.mask(seats, masked.data_ptr(), masked.stride(0), _DTYPES[masked.dtype], stream)
    wrong = 0
    for row, request in enumerate(host):
        expected = logits[row].clone()
        if seats[row] >= 0 and request.has_bad_text:
            expected[torch.from_numpy(request.banned_token_ids().astype(np.int64))] = -torch.inf
        wrong += not torch.equal(masked[row].nan_to_num(7.0), expected.nan_to_num(7.0))
    return wrong


def _logits(rng: np.random.Generator, rows: int, vocab_size: int, dtype: torch.dtype, stride: int) -> Any:
    generator = torch.Generator("cuda").manual_seed(int(rng.integers(0, 2**31)))
    full = torch.randn((rows, stride), device="cuda", generator=generator) * 3
    full[:, :6] += 9
    if rng.random() < 0.05:
        full[0, 1] = float("nan")
    if rng.random() < 0.03:
        full[0, 2] = float("inf")
    if rng.random() < 0.03:
        full[0] = float("-inf")
    return full.to(dtype)[:, :vocab_size]


def sequences(seed: int, vocab_size: int) -> Iterator[tuple[int, int]]:
    """Run steps forever; give, for each, its rows and how many of them differ."""
    rng = np.random.default_rng(seed)
    native = _core.SeatSampler(0, vocab_size, MAX_ROWS)
    cpu = Sampler()
    running: dict[int, Copies] = {}
    strings = Strings(rng, vocab_size)
    stream = torch.cuda.current_stream().cuda_stream
    stride = (vocab_size + 7) // 8 * 8 + int(rng.choice([0, 1, 8]))
    step = 0
    while True:
        step += 1
        for seat in range(MAX_ROWS):
            if seat in running and rng.random() < 0.02:
                copies = running.pop(seat)
                native.remove(seat)
                if rng.random() < 0.5:  # preempted, and resumed with less than it had
                    copies.host.truncate(int(rng.integers(0, copies.host.num_output_tokens + 1)))
                    running[seat] = copies
                    native.put(seat, copies.fresh())
            elif seat not in running and rng.random() < 0.1:
                output = rng.integers(0, 6, rng.integers(0, 9)).tolist()
                running[seat] = Copies(rng, vocab_size, output, strings.bad_text())
                native.put(seat, running[seat].fresh())
        if not running:
            continue
        seats = np.array(rng.permutation([s for s in running if rng.random() < 0.9] or list(running)))
        rows = len(seats)
        advances = rng.random(rows) < 0.9
        dtype = list(_DTYPES)[int(rng.integers(0, 3))]
        logits = _logits(rng, rows, vocab_size, dtype, stride)
        host = [running[seat].host for seat in seats.tolist()]
        if rng.random() < 0.05:  # another sampler's turn
            drawn = torch.randint(0, 6, (rows, 1), device="cuda", dtype=torch.int64)
            skipped = np.where(rng.random(rows) < 0.1, -1, seats)
            wrong = _check_mask(native, skipped, host, logits, stream)
            native.follow(skipped, advances, drawn.data_ptr(), 1, 64, stream)
            for row, token in enumerate(drawn[:, 0].tolist()):
                if not advances[row]:
                    continue
                host[row].append(token)
                if skipped[row] < 0:
                    native.put(int(seats[row]), running[int(seats[row])].fresh())
            yield rows, wrong
            continue
        num_logprobs = int(rng.choice([-1, -1, 0, 5]))
        processed = bool(rng.random() < 0.5)
        width = 1 + num_logprobs
        masks, mask_rows = None, None
        if rng.random() < 0.2:
            words = (vocab_size + 31) // 32
            masks = torch.from_numpy(rng.integers(-(2**31), 2**31, (3, words)).astype(np.int32))
            mask_rows = rng.integers(-1, 3, rows).astype(np.int32)
        on_device = None if masks is None else masks.to(logits.device)
        results = torch.full((8 * rows + 2 * width * rows,), -99, dtype=torch.int32, device="cuda")
        at = [results.data_ptr() + 4 * rows * i for i in range(10 + 2 * width)]
        receipt = native.draw(
            seats, advances, logits.data_ptr(), stride, _DTYPES[dtype], mask_rows=mask_rows,
            masks=0 if on_device is None else on_device.data_ptr(),
            mask_stride=0 if on_device is None else on_device.stride(0), token_ids=at[0], status=at[1],
            tokens64=at[2], tokens32=at[4], num_sampled=at[5], num_rejected=at[6], ranks=at[7],
            top_ids=at[8], top_logprobs=at[8 + width], num_logprobs=num_logprobs,
            processed_logprobs=processed, stream=stream,
        )  # fmt: skip
        expected = cpu.sample(
            logits.float().cpu().numpy(), host, advance=advances, bitmask=None if masks is None else masks.numpy(),
            bitmask_rows=mask_rows,
            num_logprobs=None if num_logprobs < 0 else num_logprobs,
            logprobs_mode="processed" if processed else "raw",
        )  # fmt: skip
        found = results.cpu().numpy().reshape(8 + 2 * width, rows)
        wide = found[2:4].reshape(-1).view(np.int64)
        empty = expected.status & STATUS_NO_TOKEN != 0
        admissible = np.where(empty, 0, expected.token_ids)
        same = found[0] == expected.token_ids
        same &= receipt.read() == expected.status
        same &= (found[4] == admissible) & (wide == admissible)
        same &= (found[5] == advances) & (found[6] == 0)
        if expected.logprobs is not None:
            ids, values = found[8 : 8 + width], found[8 + width :]
            same &= found[7] == expected.logprobs.ranks
            same &= (ids.reshape(rows, width) == expected.logprobs.token_ids).all(1)
            bits = expected.logprobs.logprobs.view(np.int32)
            same &= (values.reshape(rows, width) == bits).all(1)
        for row in np.flatnonzero(empty & advances).tolist():
            running.pop(int(seats[row]))  # it ends; the seat is filled anew
        yield rows, int(np.count_nonzero(~same))
        sequences.waits = native.waits()  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000, help="rows to draw, over all vocabularies")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    bad = 0
    for vocab_size in (1000, 32_000, 50_257, 128_256):
        begin, rows, differences = time.monotonic(), 0, 0
        for drawn, different in sequences(arguments.seed, vocab_size):
            rows += drawn
            differences += different
            if rows >= arguments.rows // 4:
                break
        waits = sequences.waits  # type: ignore[attr-defined]
        print(
            f"{vocab_size}: {rows} rows, {differences} differences, waits {waits}, "
            f"{time.monotonic() - begin:.0f} s",
            flush=True,
        )
        bad += differences
    sys.exit(bad != 0)


if __name__ == "__main__":
    main()
