"""The token sampler: logits in, token ids out, the same bits everywhere.

A drawn token depends only on its logits row, the request's parameters, the seed, the output index and
the position of the token: not on the batch, the order of its rows, the number of threads or the
instruction set. docs/sampler.md is the specification; `SPEC_VERSION` is its version.

    sampler = Sampler()
    request = Request(vocab_size, temperature=0.8, top_p=0.95, seed=7, prompt_token_ids=prompt)
    result = sampler.sample(logits, [request])   # logits: [1, vocab_size], numpy or torch, CPU
    token = int(result.token_ids[0])             # already appended to the request
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from twinjet import _core
from twinjet._core import SamplerRequest as Request
from twinjet.sampling import cuda as _cuda

__all__ = [
    "SPEC_VERSION",
    "STATUS_INFINITE",
    "STATUS_NAN",
    "STATUS_NO_TOKEN",
    "Logprobs",
    "Request",
    "SampleResult",
    "Sampler",
    "cpu_target",
    "cpu_targets",
    "new_seed",
]

SPEC_VERSION: int = _core.SAMPLER_SPEC_VERSION
STATUS_NAN: int = _core.SAMPLER_STATUS_NAN
STATUS_INFINITE: int = _core.SAMPLER_STATUS_INFINITE
STATUS_NO_TOKEN: int = _core.SAMPLER_STATUS_NO_TOKEN

LogprobsMode = Literal["raw", "processed"]


def cpu_target() -> str:
    """Name the instruction set in use: "scalar", "avx2" or "avx512".

    The best one that the CPU has, unless the environment variable TWINJET_CPU_TARGET names another.

    Raises:
        ValueError: TWINJET_CPU_TARGET names an unknown target or one this CPU lacks.
    """
    return _core.sampler_cpu_target()


def cpu_targets() -> list[str]:
    """Name the instruction sets that this build and this CPU have, the preferred one first."""
    return _core.sampler_cpu_targets()


def new_seed() -> int:
    """Draw a seed on [0, 2**63) for a request that has none; show it, so that the answer can be replayed."""
    return secrets.randbits(63)


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Natural-log probabilities of the drawn token and of the most likely tokens.

    Attributes:
        token_ids: int32 [rows, 1 + n]; column 0 is the drawn token, then the n tokens with the largest
            logits, larger first, the lower id first among equals; -1 where the vocabulary has fewer.
        logprobs: float32 [rows, 1 + n]; -inf for a masked or filtered token and for -1.
        ranks: int32 [rows]; how many tokens have a logit at least as large as the drawn one's (1 is best).
    """

    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    ranks: npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class SampleResult:
    """What one call drew.

    Attributes:
        token_ids: int32 [rows]; -1 where no token was admissible.
        status: uint32 [rows]; 0 or a union of STATUS_NAN (NaN logits were counted as -inf),
            STATUS_INFINITE (the largest logit is +inf; the +inf tokens weigh the same, the others nothing)
            and STATUS_NO_TOKEN (every token masked, -inf or NaN: end this request with an error).
        logprobs: None unless asked for. A row without a token has ids -1, -inf and rank 0 in column 0.
    """

    token_ids: npt.NDArray[np.int32]
    status: npt.NDArray[np.uint32]
    logprobs: Logprobs | None


class Sampler:
    """Draws one token per row of a batch of logits.

    Holds its threads and its scratch memory and nothing of any request; a step allocates only the arrays
    it returns. Threads start at the first batch that needs them, and again after a fork. One call at a
    time runs; concurrent calls wait for one another.

    Args:
        num_threads: most threads a call may use, the calling one included; 0 takes the CPUs this
            process may run on, at most 16. Results do not depend on it.
        target: "scalar", "avx2" or "avx512"; "" takes `cpu_target()`.

    Raises:
        ValueError: num_threads is negative, or this CPU lacks the target.
    """

    def __init__(self, num_threads: int = 0, target: str = "") -> None:
        self._core = _core.Sampler(num_threads, target)
        self._cuda_samplers: dict[int, _cuda.CudaSampler] = {}

    @property
    def num_threads(self) -> int:
        """Most threads a call uses, the calling one included."""
        return self._core.num_threads

    @property
    def target(self) -> str:
        """Name of the instruction set this sampler uses."""
        return self._core.target

    def sample(
        self,
        logits: Any,
        requests: Sequence[Request],
        *,
        bitmask: Any | None = None,
        bitmask_rows: npt.NDArray[np.int32] | None = None,
        advance: bool | npt.NDArray[np.bool_] = True,
        num_logprobs: int | None = None,
        logprobs_mode: LogprobsMode = "raw",
        processed_logits: npt.NDArray[np.float32] | None = None,
        dtype: str = "",
    ) -> SampleResult:
        """Draw one token per row.

        Args:
            logits: [rows, vocab_size] or [vocab_size], float32, float16 or bfloat16: a numpy array, a torch
                tensor or anything else with the buffer protocol or DLPack. On a CUDA device (torch or cupy)
                the tokens are drawn there, the same ones, and the call waits for them. Not copied and not
                changed.
                Tokens of a row must be adjacent in memory; the distance of rows is free.
            requests: one request per row, in row order; no request twice. Its vocab_size must be the row's.
            bitmask: grammar masks, int32 [n, at least ceil(vocab_size / 32)], bit i % 32 of word i // 32
                is 1 when token i is allowed; None allows all.
            bitmask_rows: int32 [rows], the bitmask row of each logits row, -1 for none; None is 0, 1, 2 ...
            advance: True appends the drawn token to each request; a bool array [rows] chooses rows (a row of
                a prefill in progress, whose token is thrown away, must not advance).
            num_logprobs: None for no logprobs; n >= 0 for the drawn token and the n most likely ones.
            logprobs_mode: "raw" is the log-softmax of the logits as they were passed, before masks, penalties
                and temperature; "processed" is the distribution that the token was drawn from (for a greedy
                request: temperature 1, no filters, after masks and penalties).
            processed_logits: float32 [rows, vocab_size], C-contiguous, writable: receives the logits after
                masks, bias and penalties, before temperature and filters. None skips this.
            dtype: "bfloat16" reads a 16-bit integer buffer as bfloat16 (numpy has no such type); "" takes the
                array's own.

        Returns:
            The tokens, a status per row, and the logprobs if asked for. A row without an admissible token
            has status STATUS_NO_TOKEN, token -1, and does not advance; the other rows are not affected.

        Raises:
            TypeError: an argument has no buffer or DLPack face, or a wrong dtype.
            ValueError: a wrong shape, stride, device, vocabulary size or count, or a request given twice.
        """
        if logprobs_mode not in ("raw", "processed"):
            raise ValueError(f"logprobs_mode is {logprobs_mode!r}: must be 'raw' or 'processed'")
        if num_logprobs is not None and num_logprobs < 0:
            raise ValueError(f"num_logprobs is {num_logprobs}: must be None or at least 0")
        if _cuda.device_of(logits) is not None:
            drawn, flags, tops = _cuda.sample(
                self._cuda_samplers,
                logits,
                requests,
                bitmask=bitmask,
                bitmask_rows=bitmask_rows,
                advance=advance,
                num_logprobs=num_logprobs,
                processed_logprobs=logprobs_mode == "processed",
                processed_logits=processed_logits,
                dtype=dtype,
            )
            return SampleResult(drawn, flags, None if tops is None else Logprobs(*tops))
        tokens, status, top_ids, top_logprobs, ranks = self._core.sample(
            logits,
            dtype,
            requests,
            bitmask,
            bitmask_rows,
            advance,
            -1 if num_logprobs is None else num_logprobs,
            logprobs_mode == "processed",
            processed_logits,
        )
        logprobs = None
        if top_ids is not None and top_logprobs is not None and ranks is not None:
            logprobs = Logprobs(top_ids, top_logprobs, ranks)
        return SampleResult(tokens, status, logprobs)
