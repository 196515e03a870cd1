#!/usr/bin/env bash
# Build the wheels, install them into a fresh environment and serve a call through the native door there, with the
# system's nghttp2 out of sight. Takes minutes: it compiles the extension.
set -eu -o pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" wheel -q --no-deps -w "$folder/wheels" . ./python
"$folder/venv/bin/pip" install -q "$folder"/wheels/*.whl

cat >"$folder/call.py" <<'END'
import asyncio

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from twinjet.config import ServerSettings
from twinjet.server.native_door import NativeDoor


async def main() -> None:
    door = NativeDoor(ServerSettings(port=0))
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), door)
    address = door.bind()
    await door.start()
    async with grpc.aio.insecure_channel(address) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
    await door.stop(0)
    (used,) = {line.split()[-1] for line in open("/proc/self/maps") if "nghttp2" in line}
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    print("served through", door.name, "with", used.rsplit("/site-packages/", 1)[1])


asyncio.run(main())
END
# In a mount namespace of its own the system's library is an empty file.
hide() {
  local library
  for library in $(find /lib /usr/lib /usr/local/lib -name 'libnghttp2.so*' -type f); do
    mount --bind /dev/null "$library"
  done
  if "$folder/venv/bin/python" -c 'import ctypes; ctypes.CDLL("libnghttp2.so.14")' 2>/dev/null; then
    echo "the system's nghttp2 is still in sight" && exit 1
  fi
  cd "$folder" && exec "$folder/venv/bin/python" call.py
}
export folder
export -f hide
unshare --mount --map-root-user bash -eu -c hide
