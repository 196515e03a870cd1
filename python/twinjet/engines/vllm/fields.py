"""Names that the front end and the engine's process agree on; needs no vLLM."""

EXTRA_KEY = "twinjet"
"""Under this key of SamplingParams.extra_args our sampler finds what vLLM's own fields cannot hold."""

NO_TOKEN = -1
"""The stop token by which our sampler ends a request whose row has no admissible token."""

COUNTERS_METHOD = "twinjet_sampler_counters"
"""Worker method that gives the sampler's counters."""
