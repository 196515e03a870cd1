"""What an installed package brings itself; deploy/check_wheel.sh shows more, and takes minutes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from twinjet import _core
from twinjet.server import native_door

CORE = Path(_core.__file__)


@pytest.mark.skipif(not native_door.is_available(), reason="this build has no native door")
@pytest.mark.skipif("site-packages" not in CORE.parts, reason="the extension was built into the tree")
def test_an_installed_extension_uses_the_nghttp2_beside_it() -> None:
    program = "import twinjet._core; print(open('/proc/self/maps').read())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    used = {line.split()[-1] for line in done.stdout.splitlines() if "nghttp2" in line}
    assert {Path(path).parent for path in used} == {CORE.parent}
