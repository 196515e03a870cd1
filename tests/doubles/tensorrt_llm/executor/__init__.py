"""Stand-in for tensorrt_llm.executor."""
