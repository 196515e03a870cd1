"""The messages of xds.data.orca.v3 and xds.service.orca.v3 as xds-protos 1.85.0 has them, field by field.

That package overwrites googleapis-common-protos, so the tests do not install it.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, duration_pb2, message_factory

_Field = descriptor_pb2.FieldDescriptorProto
_DOUBLES = {
    "cpu_utilization": 1, "mem_utilization": 2, "rps_fractional": 6, "eps": 7, "application_utilization": 9,
}  # fmt: skip
_MAPS = {"request_cost": 4, "utilization": 5, "named_metrics": 8}


def _messages() -> tuple[Any, Any]:
    file = descriptor_pb2.FileDescriptorProto(
        name="orca.proto", package="orca", syntax="proto3", dependency=["google/protobuf/duration.proto"]
    )
    report = file.message_type.add(name="OrcaLoadReport")
    for name, number in _DOUBLES.items():
        report.field.add(name=name, number=number, type=_Field.TYPE_DOUBLE, label=_Field.LABEL_OPTIONAL)
    report.field.add(name="rps", number=3, type=_Field.TYPE_UINT64, label=_Field.LABEL_OPTIONAL)
    for name, number in _MAPS.items():
        entry = report.nested_type.add(name="".join(p.title() for p in name.split("_")) + "Entry")
        entry.options.map_entry = True
        entry.field.add(name="key", number=1, type=_Field.TYPE_STRING, label=_Field.LABEL_OPTIONAL)
        entry.field.add(name="value", number=2, type=_Field.TYPE_DOUBLE, label=_Field.LABEL_OPTIONAL)
        report.field.add(
            name=name, number=number, type=_Field.TYPE_MESSAGE, label=_Field.LABEL_REPEATED,
            type_name=f".orca.OrcaLoadReport.{entry.name}",
        )  # fmt: skip
    request = file.message_type.add(name="OrcaLoadReportRequest")
    request.field.add(
        name="report_interval", number=1, type=_Field.TYPE_MESSAGE, label=_Field.LABEL_OPTIONAL,
        type_name=".google.protobuf.Duration",
    )  # fmt: skip
    request.field.add(
        name="request_cost_names", number=2, type=_Field.TYPE_STRING, label=_Field.LABEL_REPEATED
    )
    pool = descriptor_pool.DescriptorPool()
    duration = descriptor_pb2.FileDescriptorProto()
    duration_pb2.DESCRIPTOR.CopyToProto(duration)
    pool.Add(duration)
    pool.Add(file)
    names = ("OrcaLoadReport", "OrcaLoadReportRequest")
    made = [message_factory.GetMessageClass(pool.FindMessageTypeByName(f"orca.{name}")) for name in names]
    return made[0], made[1]


OrcaLoadReport, OrcaLoadReportRequest = _messages()


def weight(report: Any, penalty: float = 1.0) -> float:
    """The weight that gRPC and Envoy give an endpoint by its report; 0 is no weight of its own."""
    if report.rps_fractional <= 0 or report.application_utilization <= 0:
        return 0.0
    rate = report.rps_fractional
    return float(rate / (report.application_utilization + penalty * report.eps / rate))
