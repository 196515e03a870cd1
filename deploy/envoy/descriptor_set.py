"""Writes the descriptor set that Envoy's JSON transcoder reads: `python deploy/envoy/descriptor_set.py twinjet.pb`.

The contract as the installed package has it, with what it imports, and the google.rpc details of errors.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import FileDescriptor
from google.rpc import error_details_pb2, status_pb2

from twinjet.v1 import service_pb2


def descriptor_set() -> descriptor_pb2.FileDescriptorSet:
    """Give the files, each after those that it imports."""
    files = descriptor_pb2.FileDescriptorSet()
    seen: set[str] = set()

    def add(file: FileDescriptor) -> None:
        if file.name in seen:
            return
        seen.add(file.name)
        for imported in file.dependencies:
            add(imported)
        file.CopyToProto(files.file.add())

    for module in (service_pb2, error_details_pb2, status_pb2):
        add(module.DESCRIPTOR)
    return files


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.parse_args().file.write_bytes(descriptor_set().SerializeToString())
