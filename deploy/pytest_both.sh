#!/usr/bin/env bash
# Run the quick tests, then those with a real engine, even if the first fail, with the slowest named; end with both summaries.
set -u -o pipefail
mkdir -p build
status=0
${PYTEST:?} --durations=40 -m "not engine" 2>&1 | tee build/pytest-fast.log || status=1
${PYTEST:?} --durations=20 -m engine 2>&1 | tee build/pytest-engine.log || status=1
echo "without an engine: $(tail -n 1 build/pytest-fast.log)"
echo "with the engine:   $(tail -n 1 build/pytest-engine.log)"
exit "$status"
