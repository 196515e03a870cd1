"""Stand-in for tensorrt_llm.executor.result."""

from tensorrt_llm._results import CompletionOutput
from tensorrt_llm._sampler import Logprob

__all__ = ["CompletionOutput", "Logprob"]
