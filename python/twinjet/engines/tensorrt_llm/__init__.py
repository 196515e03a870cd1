"""The TensorRT-LLM engine (engine.py); the engine's workers import parts of it, so nothing is imported here."""
