"""Generate the Python stubs of the contracts below a folder: `generate.py OUT` fills OUT/twinjet/v1 and
OUT/twinjet/protocols/*/v1.

The build runs it; `make stubs` runs it with OUT=python for tools that read the source tree. A protocol of others keeps
its own package on the wire; its stubs lie below twinjet, where they are in nobody's way.
"""

import re
import shutil
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

PROTO_ROOT = Path(__file__).resolve().parent
PROTOCOLS = ("openengine",)


def generate(out: Path, package: str, doc: str) -> int:
    """Fill OUT/PACKAGE/v1. Gives protoc's status."""
    folder = out / package / "v1"
    folder.mkdir(parents=True, exist_ok=True)
    include = Path(protoc.__file__).parent / "_proto"
    protos = sorted(str(p) for p in (PROTO_ROOT / package / "v1").glob("*.proto"))
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
    (folder / "__init__.py").write_text(f'"""{doc}"""\n')
    return int(status)


def generate_protocol(out: Path, name: str) -> int:
    """Fill OUT/twinjet/protocols/NAME/v1, whose modules import each other from there. Gives protoc's status."""
    folder = out / "twinjet" / "protocols" / name / "v1"
    with tempfile.TemporaryDirectory() as scratch:
        status = generate(Path(scratch), name, f"Stubs of {name}.v1, generated from proto/{name}/v1.")
        imported = re.compile(rf"(?<![\w.]){name}\.v1(?=\.\w+_pb2| import )")
        for file in (Path(scratch) / name / "v1").iterdir():
            file.write_text(imported.sub(f"twinjet.protocols.{name}.v1", file.read_text()))
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(Path(scratch) / name / "v1", folder)
    return status


def main(out: Path) -> int:
    statuses = [generate(out, "twinjet", "Stubs of the wire contract, generated from proto/twinjet/v1.")]
    statuses += [generate_protocol(out, name) for name in PROTOCOLS]
    return max(statuses)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
