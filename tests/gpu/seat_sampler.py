"""The sampler that keeps requests on the device against the CPU's, bit for bit, over whole sequences.

    PYTHONPATH=python python tests/gpu/seat_sampler.py [--rows 200000] [--seed 1]

Needs torch with CUDA and the extension with its CUDA side. Requests of all parameters enter, draw, are drawn
for by another sampler, rolled back and leave, in batches of changing size; each step's tokens, statuses and
logprobs are compared with the CPU's on the same logits. Prints the number of differences and how often the
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
from twinjet.sampling import STATUS_NO_TOKEN, Request, Sampler

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
MAX_ROWS = 64


class Copies:
    """One sequence as the device has it and as the CPU has it."""

    def __init__(self, rng: np.random.Generator, vocab_size: int, output: list[int]) -> None:
        self.options = _options(rng, vocab_size)
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
                running[seat] = Copies(rng, vocab_size, rng.integers(0, 6, rng.integers(0, 9)).tolist())
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
            native.follow(skipped, advances, drawn.data_ptr(), 1, 64, stream)
            for row, token in enumerate(drawn[:, 0].tolist()):
                if not advances[row]:
                    continue
                host[row].append(token)
                if skipped[row] < 0:
                    native.put(int(seats[row]), running[int(seats[row])].fresh())
            continue
        num_logprobs = int(rng.choice([-1, -1, 0, 5]))
        processed = bool(rng.random() < 0.5)
        width = 1 + num_logprobs
        results = torch.full((8 * rows + 2 * width * rows,), -99, dtype=torch.int32, device="cuda")
        at = [results.data_ptr() + 4 * rows * i for i in range(10 + 2 * width)]
        receipt = native.draw(
            seats, advances, logits.data_ptr(), stride, _DTYPES[dtype], token_ids=at[0], status=at[1],
            tokens64=at[2], tokens32=at[4], num_sampled=at[5], num_rejected=at[6], ranks=at[7],
            top_ids=at[8], top_logprobs=at[8 + width], num_logprobs=num_logprobs,
            processed_logprobs=processed, stream=stream,
        )  # fmt: skip
        expected = cpu.sample(
            logits.float().cpu().numpy(), host, advance=advances,
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
