"""Generate the Python stubs of twinjet.v1 below a folder: `generate.py OUT` fills OUT/twinjet/v1.

The build runs it; `make stubs` runs it with OUT=python for tools that read the source tree.
"""

import sys
from pathlib import Path

from grpc_tools import protoc

PROTO_ROOT = Path(__file__).resolve().parent


def main(out: Path) -> int:
    package = out / "twinjet" / "v1"
    package.mkdir(parents=True, exist_ok=True)
    include = Path(protoc.__file__).parent / "_proto"
    protos = sorted(str(p) for p in (PROTO_ROOT / "twinjet" / "v1").glob("*.proto"))
    status = protoc.main(
        [
            "protoc",
            f"-I{PROTO_ROOT}",
            f"-I{include}",
            f"--python_out={out}",
            f"--grpc_python_out={out}",
            f"--mypy_out={out}",
            f"--mypy_grpc_out={out}",
            *protos,
        ]
    )
    (package / "__init__.py").write_text(
        '"""Stubs of the wire contract, generated from proto/twinjet/v1."""\n'
    )
    return int(status)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
