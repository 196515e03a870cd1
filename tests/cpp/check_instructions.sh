#!/bin/sh
# Count what work costs and hold it against a committed budget: check_instructions.sh PROGRAM BUDGET.txt
# BUDGET.txt: lines "WORKLOAD INSTRUCTIONS_A_UNIT". More than 5% above is a failure, and so is more than 10% below,
# which asks for the lower figure to be committed. Ends with 77, skipped, where there is no valgrind or the
# compiler is not the one of the figures.
set -eu
program=$1 budget=$2
command -v valgrind >/dev/null || { echo "valgrind is missing: skipped"; exit 77; }
compiler=$(sed -n 's/^# compiler: //p' "$budget")
strings -a "$program" | grep -qF "$compiler" || { echo "built by another compiler than $compiler: skipped"; exit 77; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
status=0
while read -r name allowed; do
  case $name in '#'* | '') continue ;; esac
  units=$(valgrind --tool=callgrind --callgrind-out-file="$folder/out" --toggle-collect='Measured*' \
    "$program" "$name" 2>"$folder/log") || { cat "$folder/log"; exit 1; }
  total=$(sed -n 's/.*Collected : \([0-9]*\).*/\1/p' "$folder/log")
  each=$((total / units))
  verdict=ok
  [ $((each * 100)) -le $((allowed * 105)) ] || verdict="FAILED: above the budget"
  [ $((each * 100)) -ge $((allowed * 90)) ] || verdict="FAILED: well below the budget, write it down"
  [ "$verdict" = ok ] || status=1
  echo "$name: $each instructions, budget $allowed: $verdict"
done <"$budget"
exit $status
