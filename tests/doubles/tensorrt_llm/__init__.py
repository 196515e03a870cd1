"""A stand-in for tensorrt_llm that enforces its recorded contract; see _contract.py and _core.py.

It runs a small deterministic model on the CPU. A prompt whose text contains one of these words misbehaves:
!fail, !fail:N (that request fails, after N tokens), !die, !die:N (all workers end, after N tokens), !lose, !lose:N (one
worker ends and the others hang), !cuda, !cuda:N (the device is gone: every request fails by itself, from then on),
!stall (that request never gets a token), !hang, !hang:N (the engine goes silent and still looks healthy).
"""

from tensorrt_llm._contract import VERSION
from tensorrt_llm._core import LLM
from tensorrt_llm.sampling_params import SamplingParams

__version__ = {"1.2": "1.2.1+double", "1.3": "1.3.0rc24+double"}[VERSION]

__all__ = ["LLM", "SamplingParams", "__version__"]
