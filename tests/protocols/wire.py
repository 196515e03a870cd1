"""Published wires, as facts: openengine_wire.json has numbers, names, types and presence of all fields."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

OPENENGINE: dict[str, Any] = json.loads((Path(__file__).parent / "openengine_wire.json").read_text())
