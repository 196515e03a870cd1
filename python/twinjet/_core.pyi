"""Types of the extension module; the documented faces are twinjet.sampling and twinjet.kv."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__version__: str

# ---- sampler ----

SAMPLER_SPEC_VERSION: int
SAMPLER_STATUS_NAN: int
SAMPLER_STATUS_INFINITE: int
SAMPLER_STATUS_NO_TOKEN: int

def sampler_cpu_target() -> str: ...
def sampler_cpu_targets() -> list[str]: ...
def sampler_weights(
    row: npt.NDArray[np.float32], temperature: float, target: str = ""
) -> npt.NDArray[np.uint64]: ...
def sampler_exponential(seed: int, position: int, output_index: int, index: int) -> float: ...
def sampler_ln(x: float) -> float: ...

class SamplerRequest:
    def __init__(
        self,
        vocab_size: int,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        seed: int = 0,
        output_index: int = 0,
        position_offset: int | None = None,
        prompt_token_ids: Sequence[int] | npt.NDArray[Any] = (),
        output_token_ids: Sequence[int] | npt.NDArray[Any] = (),
        logit_bias: Mapping[int, float] | None = None,
        allowed_token_ids: Sequence[int] | npt.NDArray[Any] | None = None,
        bad_words: Sequence[Sequence[int]] | None = None,
        min_tokens: int = 0,
        stop_token_ids: Sequence[int] | npt.NDArray[Any] = (),
    ) -> None: ...
    def append(self, token_id: int) -> None: ...
    def truncate(self, num_output_tokens: int) -> None: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def output_index(self) -> int: ...
    @property
    def position(self) -> int: ...
    @property
    def num_output_tokens(self) -> int: ...
    @property
    def output_token_ids(self) -> npt.NDArray[np.int32]: ...
    @property
    def is_greedy(self) -> bool: ...

class Sampler:
    def __init__(self, num_threads: int = 0, target: str = "") -> None: ...
    def sample(
        self,
        logits: object,
        dtype: str,
        requests: Sequence[SamplerRequest],
        bitmask: object | None,
        bitmask_rows: npt.NDArray[np.int32] | None,
        advance: bool | npt.NDArray[np.bool_],
        num_logprobs: int,
        processed_logprobs: bool,
        processed_logits: npt.NDArray[np.float32] | None,
    ) -> tuple[
        npt.NDArray[np.int32],
        npt.NDArray[np.uint32],
        npt.NDArray[np.int32] | None,
        npt.NDArray[np.float32] | None,
        npt.NDArray[np.int32] | None,
    ]: ...
    @property
    def num_threads(self) -> int: ...
    @property
    def target(self) -> str: ...
