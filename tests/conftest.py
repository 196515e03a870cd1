"""Fixtures that several packages of tests share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def demo_model_path() -> Path:
    """The converted demo model, in the user's own cache: converted once, used by every later run."""
    pytest.importorskip("tokenizers")
    from twinjet.models.demo import demo_model

    return demo_model()
