"""Turns gRPC bytes into messages without letting gRPC answer for us, and tells what is wrong with bad ones.

gRPC answers bytes that do not parse with INTERNAL and no details. Here they become a Malformed value, which the
handler answers with INVALID_ARGUMENT naming the field. So do messages of so many values that reading them would hold
up everybody else: a message of 10 MB can hold five million strings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import FieldDescriptor, FileDescriptor
from google.protobuf.message import DecodeError, Message

from twinjet._core import MessageShape
from twinjet.errors import Violation
from twinjet.server.status import MAX_VIOLATIONS

MAX_VALUES: Final = 1 << 16
"""Strings, messages and single values that one request may hold."""
MAX_NUMBERS: Final = 1 << 22
"""Numbers, token ids most of all, that one request may hold in lists."""
_CHECKED_BYTES: Final = 1 << 16
"""Smaller messages cannot hold enough to matter."""


@dataclass(frozen=True, slots=True)
class Malformed:
    """Bytes that are not the message they should be."""

    violations: tuple[Violation, ...]


def deserializer(message_class: type[Message]) -> Callable[[bytes], Message | Malformed]:
    """Make a request deserializer for gRPC that never raises."""

    descriptor = message_class.DESCRIPTOR
    shape = _shape(descriptor)

    def parse(data: bytes) -> Message | Malformed:
        if len(data) > _CHECKED_BYTES and (path := shape.find_excess(data, MAX_VALUES, MAX_NUMBERS)):
            return Malformed((_excess(descriptor, path),))
        try:
            return message_class.FromString(data)
        except DecodeError:
            return Malformed(_explain(descriptor.file, descriptor.name, descriptor.full_name, data))

    return parse


@cache
def _shape(descriptor: Any) -> MessageShape:
    """Give the message and all that it can hold as MessageShape wants them."""
    places = {descriptor.full_name: 0}
    found = [descriptor]
    types: list[list[tuple[int, int]]] = []
    for message in found:
        fields = []
        for field in message.fields:
            if field.message_type is not None:
                if field.message_type.full_name not in places:
                    places[field.message_type.full_name] = len(found)
                    found.append(field.message_type)
                fields.append((field.number, places[field.message_type.full_name]))
            elif field.is_repeated and field.type in _PACKED:
                fields.append((field.number, _PACKED[field.type]))
        types.append(fields)
    return MessageShape(types)


_PACKED: Final = {
    number: -1
    for name, number in vars(FieldDescriptor).items()
    if name.startswith("TYPE_") and name not in ("TYPE_STRING", "TYPE_BYTES", "TYPE_MESSAGE", "TYPE_GROUP")
} | {
    FieldDescriptor.TYPE_FLOAT: -2, FieldDescriptor.TYPE_FIXED32: -2, FieldDescriptor.TYPE_SFIXED32: -2,
    FieldDescriptor.TYPE_DOUBLE: -3, FieldDescriptor.TYPE_FIXED64: -3, FieldDescriptor.TYPE_SFIXED64: -3,
}  # fmt: skip
"""Types whose lists are packed, with MessageShape's names for them."""


def _excess(root: Any, path: list[int]) -> Violation:
    names: list[str] = []
    told = f"{MAX_VALUES} strings, messages and values"
    descriptor: Any = root
    for number in path:
        field = descriptor.fields_by_number.get(number)
        if field is None or descriptor.GetOptions().map_entry:
            break
        names.append(field.name)
        if field.is_repeated and field.type in _PACKED:
            told = f"{MAX_NUMBERS} numbers in lists"
        descriptor = field.message_type
    name = ".".join(names) or root.name
    return Violation(name, f"with it the request has more than {told}; at most so many are allowed")


def _explain(file: Any, name: str, full_name: str, data: bytes) -> tuple[Violation, ...]:
    """Find the strings that are not UTF-8, by parsing the same bytes with every string as bytes."""
    pool = _lenient_pool(file)
    lenient = message_factory.GetMessageClass(pool.FindMessageTypeByName(full_name))
    try:
        message = lenient.FromString(data)
    except DecodeError:
        return (Violation(name, f"is not a valid {full_name} message"),)
    return tuple(islice(_invalid_text(message, ""), MAX_VIOLATIONS)) or (
        Violation(name, f"is not a valid {full_name} message"),
    )


def _invalid_text(message: Message, prefix: str) -> Iterator[Violation]:
    for field, value in message.ListFields():
        path = prefix + field.name
        values = list(value) if field.is_repeated else [value]
        for item in values:
            if field.type == FieldDescriptor.TYPE_MESSAGE and isinstance(item, Message):
                yield from _invalid_text(item, f"{path}.")
            elif isinstance(item, bytes) and not _is_utf8(item):
                yield Violation(path, "is not valid UTF-8")


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
