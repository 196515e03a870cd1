"""Reads google.rpc error details with protobuf alone.

The messages are declared here, in a pool of their own: googleapis-common-protos, which carries their stubs, would
be one more package, and a second declaration in the default pool would clash with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from google.protobuf import any_pb2, descriptor_pb2, descriptor_pool, duration_pb2, message_factory
from google.protobuf.message import DecodeError

_Field = descriptor_pb2.FieldDescriptorProto
_PACKAGE = "google.rpc"
_TEXTS = {
    "ErrorInfo": ("reason", "domain"),
    "BadRequest.FieldViolation": ("field", "description"),
}
"""Message to its text fields, numbered from 1. Of each message only what is read is declared."""


def _declare() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(
        name="twinjet/client/error_details.proto", package=_PACKAGE, syntax="proto3"
    )
    file.dependency.extend([any_pb2.DESCRIPTOR.name, duration_pb2.DESCRIPTOR.name])

    def field(name: str, number: int, kind: int, type_name: str = "", *, repeated: bool = False) -> _Field:
        label = _Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL
        return _Field(name=name, number=number, type=kind, type_name=type_name or None, label=label)  # type: ignore[arg-type]

    status = file.message_type.add(name="Status")
    status.field.append(field("details", 3, _Field.TYPE_MESSAGE, ".google.protobuf.Any", repeated=True))
    info = file.message_type.add(name="ErrorInfo")
    info.field.extend(field(n, i, _Field.TYPE_STRING) for i, n in enumerate(_TEXTS["ErrorInfo"], 1))
    info.field.append(
        field("metadata", 3, _Field.TYPE_MESSAGE, f".{_PACKAGE}.ErrorInfo.MetadataEntry", repeated=True)
    )
    entry = info.nested_type.add(name="MetadataEntry")
    entry.options.map_entry = True
    entry.field.extend(field(n, i, _Field.TYPE_STRING) for i, n in enumerate(("key", "value"), 1))
    retry = file.message_type.add(name="RetryInfo")
    retry.field.append(field("retry_delay", 1, _Field.TYPE_MESSAGE, ".google.protobuf.Duration"))
    bad = file.message_type.add(name="BadRequest")
    violation = bad.nested_type.add(name="FieldViolation")
    violation.field.extend(
        field(n, i, _Field.TYPE_STRING) for i, n in enumerate(_TEXTS["BadRequest.FieldViolation"], 1)
    )
    bad.field.append(
        field(
            "field_violations",
            1,
            _Field.TYPE_MESSAGE,
            f".{_PACKAGE}.BadRequest.FieldViolation",
            repeated=True,
        )
    )
    return file


def _classes() -> dict[str, Any]:
    pool = descriptor_pool.DescriptorPool()
    for needed in (any_pb2, duration_pb2):
        pool.AddSerializedFile(needed.DESCRIPTOR.serialized_pb)
    file = _declare()
    pool.AddSerializedFile(file.SerializeToString())
    names = [f"{_PACKAGE}.{message.name}" for message in file.message_type]
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(name)) for name in names}


_CLASSES = _classes()


def details(packed: bytes) -> Iterator[tuple[str, Any]]:
    """Give the details of a packed google.rpc.Status: short type name and message. Unknown ones are left out.

    What stands there may come from a proxy; unreadable details are no details.
    """
    try:
        status = _CLASSES[f"{_PACKAGE}.Status"].FromString(packed)
    except DecodeError:
        return
    for entry in status.details:
        name = entry.type_url.rpartition("/")[2]
        if name in _CLASSES:
            try:
                yield name.removeprefix(f"{_PACKAGE}."), _CLASSES[name].FromString(entry.value)
            except DecodeError:
                continue
