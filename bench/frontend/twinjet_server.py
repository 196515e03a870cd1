"""`twinjet serve` with the mock (mock_core.py) in place of vLLM's engine core; takes the arguments of serve."""

from __future__ import annotations

import sys

import mock_core

from twinjet import cli
from twinjet.engines.vllm.front import startup

if __name__ == "__main__":
    startup.CORE = mock_core.run
    sys.exit(cli.main(["serve", *sys.argv[1:]]))
