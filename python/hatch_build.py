"""Puts the stubs of the contract into twinjet-client: made from ../proto in a checkout, taken as they are elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class StubsHook(BuildHookInterface):
    """Adds twinjet/v1 to wheels and source distributions."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Make the stubs outside of the source tree, which may be in use, and have them packed."""
        self._made: Path | None = None
        root = Path(self.root)
        generator = root.parent / "proto" / "generate.py"
        stubs = root / "twinjet" / "v1"
        if generator.is_file():
            self._made = Path(tempfile.mkdtemp())
            # The plugins of the generator are programs beside the interpreter.
            path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
            subprocess.run(
                [sys.executable, str(generator), str(self._made)], check=True, env=os.environ | {"PATH": path}
            )
            stubs = self._made / "twinjet" / "v1"
        build_data["force_include"][str(stubs)] = "twinjet/v1"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was made."""
        if self._made is not None:
            shutil.rmtree(self._made)
