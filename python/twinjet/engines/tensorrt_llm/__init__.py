"""The TensorRT-LLM engine; importing it loads nothing of TensorRT-LLM."""

from twinjet.engines.tensorrt_llm.engine import TrtLlmEngine

__all__ = ["TrtLlmEngine"]
