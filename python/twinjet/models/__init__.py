"""Models that Twinjet can make ready by itself, and tokenizers read without an engine."""
