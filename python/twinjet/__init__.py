"""Twinjet: one gRPC streaming service in front of vLLM and TensorRT-LLM."""
