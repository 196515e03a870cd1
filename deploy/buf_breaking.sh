#!/usr/bin/env bash
# Compare the contract with the last release; nothing to do before the first one.
set -eu
buf=$1
tag=$(git describe --tags --abbrev=0 --match 'v*' 2>/dev/null || true)
if [ -z "$tag" ]; then
  echo "no release yet: breaking changes are not checked"
  exit 0
fi
"$buf" breaking proto --against ".git#tag=$tag,subdir=proto"
