"""What every engine has its tokens made into text and ends by: the native Output (csrc/stream/output.h)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from twinjet._core import Output, Stream, Vocabulary
from twinjet.engines.base import Finish
from twinjet.request import Sampling


def make_output(vocabulary: Vocabulary, sampling: Sampling, eos_token_ids: Iterable[int]) -> Output:
    """Make the text and the ends of one output of a request."""
    return Output(vocabulary, **output_rules(sampling, eos_token_ids))


def make_stream(
    vocabulary: Vocabulary, sampling: Sampling, eos_token_ids: Iterable[int], **facts: Any
) -> Stream:
    """Make the native stream of a request. facts: further arguments of Stream."""
    return Stream(vocabulary, num_outputs=sampling.n, **output_rules(sampling, eos_token_ids), **facts)


def output_rules(sampling: Sampling, eos_token_ids: Iterable[int]) -> dict[str, Any]:
    """Give what makes an output's text and ends it, as arguments of Output, Stream and StreamMaker."""
    return {
        "stop": list(sampling.stop),
        "eos_token_ids": [] if sampling.ignore_eos else list(eos_token_ids),
        "stop_token_ids": list(sampling.stop_token_ids),
        "min_tokens": sampling.min_tokens,
        "max_tokens": sampling.max_tokens,
        "include_stop": sampling.include_stop,
        "skip_special": sampling.skip_special_tokens,
    }


def finish_of(output: Output) -> Finish | None:
    """Say why the output ended, or None if it goes on."""
    ending = output.ending
    return None if ending is None else Finish(ending[0], ending[1], is_eos=ending[2])
