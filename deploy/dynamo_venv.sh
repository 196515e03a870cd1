#!/usr/bin/env bash
# Make the environment with Dynamo that tests/protocols/test_dynamo.py runs, unless it is there: some 80 MB to fetch and
# 310 MB on disk. Where the packages cannot be had the tests are skipped, but with CI=true that is a failure.
set -eu
cd "$(dirname "$0")/.."
venv=.cache/dynamo
wanted=$(cat deploy/requirements/dynamo.txt <("${PYTHON:-python3}" -V))
[ -e "$venv/made" ] && [ "$(cat "$venv/made")" = "$wanted" ] && exit 0
if [ "$(uname -sm)" != "Linux x86_64" ]; then
  echo "Dynamo has no packages for $(uname -sm): its tests are skipped"
  exit 0
fi
echo "installing Dynamo for the tests into $venv"
rm -rf "$venv"
if "${PYTHON:-python3}" -m venv "$venv" &&
  "$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps -r deploy/requirements/dynamo.txt; then
  echo "$wanted" > "$venv/made"
elif [ "${CI:-}" = true ]; then
  echo "Dynamo's packages could not be installed" >&2
  exit 1
else
  echo "Dynamo's packages could not be installed: its tests are skipped" >&2
fi
