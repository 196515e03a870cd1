"""Fixtures that several packages of tests share."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says something of the machine. The rest is as hypothesis has it: other examples in each run, and
# in CI the same ones for the same code.
settings.register_profile("twinjet", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("twinjet")


@pytest.fixture(scope="session")
def demo_model_path() -> Path:
    """The converted demo model, in the user's own cache: converted once, used by every later run."""
    pytest.importorskip("tokenizers")
    from twinjet.models.demo import demo_model

    return demo_model()
