"""Turns gRPC bytes into messages without letting gRPC answer for us, and tells what is wrong with bad ones.

gRPC answers bytes that do not parse with INTERNAL and no details. Here they become a Malformed value, which the
handler answers with INVALID_ARGUMENT naming the field.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import FieldDescriptor, FileDescriptor
from google.protobuf.message import DecodeError, Message

from twinjet.errors import Violation


@dataclass(frozen=True, slots=True)
class Malformed:
    """Bytes that are not the message they should be."""

    violations: tuple[Violation, ...]


def deserializer(message_class: type[Message]) -> Callable[[bytes], Message | Malformed]:
    """Make a request deserializer for gRPC that never raises."""

    descriptor = message_class.DESCRIPTOR

    def parse(data: bytes) -> Message | Malformed:
        try:
            return message_class.FromString(data)
        except DecodeError:
            return Malformed(_explain(descriptor.file, descriptor.name, descriptor.full_name, data))

    return parse


def _explain(file: Any, name: str, full_name: str, data: bytes) -> tuple[Violation, ...]:
    """Find the strings that are not UTF-8, by parsing the same bytes with every string as bytes."""
    pool = _lenient_pool(file)
    lenient = message_factory.GetMessageClass(pool.FindMessageTypeByName(full_name))
    try:
        message = lenient.FromString(data)
    except DecodeError:
        return (Violation(name, f"is not a valid {full_name} message"),)
    return tuple(_invalid_text(message, "")) or (Violation(name, f"is not a valid {full_name} message"),)


def _invalid_text(message: Message, prefix: str) -> list[Violation]:
    found: list[Violation] = []
    for field, value in message.ListFields():
        path = prefix + field.name
        values = list(value) if field.is_repeated else [value]
        for item in values:
            if field.type == FieldDescriptor.TYPE_MESSAGE and isinstance(item, Message):
                found += _invalid_text(item, f"{path}.")
            elif isinstance(item, bytes) and not _is_utf8(item):
                found.append(Violation(path, "is not valid UTF-8"))
    return found


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


@cache
def _lenient_pool(file: Any) -> descriptor_pool.DescriptorPool:
    """Give a pool with a file and all that it imports, in which every string of ours is bytes."""
    pool = descriptor_pool.DescriptorPool()
    seen: set[str] = set()

    def add(file: FileDescriptor) -> None:
        if file.name in seen:
            return
        seen.add(file.name)
        for dependency in file.dependencies:
            add(dependency)
        proto = descriptor_pb2.FileDescriptorProto()
        file.CopyToProto(proto)
        proto.ClearField("service")
        if not file.package.startswith("google."):
            for message in proto.message_type:
                _strings_to_bytes(message)
        pool.Add(proto)

    add(file)
    return pool


def _strings_to_bytes(message: descriptor_pb2.DescriptorProto) -> None:
    for field in message.field:
        if field.type == FieldDescriptor.TYPE_STRING and not message.options.map_entry:
            field.type = descriptor_pb2.FieldDescriptorProto.TYPE_BYTES
    for nested in message.nested_type:
        _strings_to_bytes(nested)
