"""Stand-in for tensorrt_llm.executor.executor."""


class CppExecutorError(RuntimeError):
    """The engine failed."""

    def __init__(self, message: str | None = None) -> None:
        self.message = message
        self.stack_trace = ""
        super().__init__(message)
