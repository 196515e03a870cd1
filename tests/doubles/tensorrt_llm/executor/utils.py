"""Stand-in for tensorrt_llm.executor.utils."""


class RequestError(RuntimeError):
    """One request failed."""
