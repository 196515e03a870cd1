"""Imported by the forkserver alone; see preload."""

from twinjet.engines.vllm.core.preload import import_engine

import_engine()
