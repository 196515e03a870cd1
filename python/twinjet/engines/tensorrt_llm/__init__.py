"""The TensorRT-LLM engine: front/ runs in the server's process, worker/ in the engine's own.

Workers unpickle parts of worker/, so nothing is imported here and worker/ imports nothing of front/.
"""
