"""Stand-in for tensorrt_llm.executor.result."""

from tensorrt_llm._core import CompletionOutput, Logprob

__all__ = ["CompletionOutput", "Logprob"]
