"""Exit code 0 if a server says that a name is served: `python health.py 127.0.0.1:50051 [NAME]`; no name: the server."""

from __future__ import annotations

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def is_served(address: str, name: str) -> bool:
    """Ask grpc.health.v1.Health once; a server that does not answer within 3 s serves nothing."""
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=name), timeout=3
            )
        except grpc.RpcError as error:
            print(f"{error.code().name}: {error.details()}", file=sys.stderr)  # type: ignore[attr-defined]
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


if __name__ == "__main__":
    sys.exit(not is_served(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""))
