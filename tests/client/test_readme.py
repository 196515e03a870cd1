"""The README's sample of the Python client, run as it is printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.server.processes import server

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_sample_says_something_three_times(tmp_path: Path) -> None:
    found = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert found is not None
    with server(tmp_path, '[deployments.fake]\nengine = "fake"\n') as (_, address):
        done = subprocess.run(
            [sys.executable, "-c", found[1].replace("localhost:50051", address)],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            timeout=120,
        )
    assert done.stderr == ""
    assert [bool(line) for line in done.stdout.rstrip("\n").split("\n")] == [True] * 3
