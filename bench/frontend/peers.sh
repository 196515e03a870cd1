#!/usr/bin/env bash
# Install what bench/frontend measures Twinjet beside into .cache/frontend-peers: vLLM's and smg's Python servers over
# the packages of the virtual environment VENV (default .venv), and vllm-rs out of vLLM's wheel, which is 300 MB to fetch.
set -eu
cd "$(dirname "$0")/../.."
venv=$PWD/.cache/frontend-peers
base=$("${VENV:-.venv}/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
requirements=deploy/requirements/frontend-peers.txt
wanted=$(cat $requirements; echo "$base")
[ -e "$venv/made" ] && [ "$(cat "$venv/made")" = "$wanted" ] && exit 0
"${VENV:-.venv}/bin/python" -m venv --clear "$venv"
"$venv/bin/pip" install -qq --disable-pip-version-check --no-deps -r $requirements
# After this environment's own folder on the path, so that what is in both comes from here.
echo "$base" > "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zz-base.pth"
if [ -n "${VLLM_RS:-}" ]; then
  ln -sf "$VLLM_RS" "$venv/vllm-rs"
else
  "$venv/bin/pip" download -qq --disable-pip-version-check --no-deps --only-binary :all: -d "$venv/wheel" vllm==0.32.0
  "$venv/bin/python" - "$venv" <<'PYTHON'
import sys
import zipfile
from pathlib import Path

venv = Path(sys.argv[1])
wheel = zipfile.ZipFile(next((venv / "wheel").glob("vllm-*.whl")))
binary = venv / "vllm-rs"
binary.write_bytes(wheel.read("vllm/vllm-rs"))
binary.chmod(0o755)
PYTHON
  rm -r "$venv/wheel"
fi
echo "$wanted" > "$venv/made"
