"""Stand-in for the binding KvCacheRetentionConfig: what it takes, and what it refuses."""

from __future__ import annotations

from datetime import timedelta


def _check(priority: int, duration: timedelta | None) -> None:
    if not isinstance(priority, int) or not 0 <= priority <= 100:
        raise RuntimeError(f"retention priority is {priority!r}")
    if duration is not None and not isinstance(duration, timedelta):
        raise TypeError(f"duration is {duration!r}")


class TokenRangeRetentionConfig:
    """Tokens from token_start to token_end, None the prompt's end."""

    def __init__(
        self, token_start: int, token_end: int | None, priority: int, duration_ms: timedelta | None = None
    ) -> None:
        _check(priority, duration_ms)
        self.token_start, self.token_end = token_start, token_end
        self.priority, self.duration_ms = priority, duration_ms


class KvCacheRetentionConfig:
    """Ranges of the prompt, and the output's blocks."""

    TokenRangeRetentionConfig = TokenRangeRetentionConfig

    def __init__(
        self,
        token_range_retention_configs: list[TokenRangeRetentionConfig],
        decode_retention_priority: int = 35,
        decode_duration_ms: timedelta | None = None,
    ) -> None:
        _check(decode_retention_priority, decode_duration_ms)
        self.token_range_retention_configs = token_range_retention_configs
        self.decode_retention_priority = decode_retention_priority
        self.decode_duration_ms = decode_duration_ms
