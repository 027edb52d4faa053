#!/usr/bin/env bash
# run.sh PYTHON BUILD SECONDS -- runs every fuzz target for SECONDS, one target after another. Prints how many inputs a
# target ran (stat::number_of_executed_units) and how many inputs reached new code (stat::new_units_added). Stops at the
# first fault: the target prints the fault and writes the input to a file. `TARGET FILE` runs this input again. Inputs
# that reach new code stay in BUILD/corpus for the next run.
set -euo pipefail
python=$1 build=$2 seconds=$3
here=$(dirname "$0")
for target in "$build"/tests/fuzz/fuzz_* readers; do
  name=${target##*/}
  corpus=$build/corpus/$name
  mkdir -p "$corpus"
  options=("-max_total_time=$seconds" -verbosity=0 -print_funcs=0 -print_final_stats=1)
  options+=("-artifact_prefix=$build/$name-")
  echo "fuzz: $name for $seconds s"
  if [ "$name" = readers ]; then
    "$python" "$here/readers.py" "${options[@]}" -max_len=4096 "$corpus" "$here/corpus"
  else
    "$target" "${options[@]}" -max_len=4096 "$corpus"
  fi
done
