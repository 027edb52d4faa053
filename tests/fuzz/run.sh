#!/usr/bin/env bash
# run.sh PYTHON BUILD SECONDS -- runs every fuzz target for this time, one after the other. It ends at the first fault:
# the target prints it and writes the input to a file, with which the target repeats it. Inputs that reach new code stay
# in BUILD/corpus for the next run.
set -euo pipefail
python=$1 build=$2 seconds=$3
here=$(dirname "$0")
for target in "$build"/tests/fuzz/fuzz_* readers; do
  name=${target##*/}
  corpus=$build/corpus/$name
  mkdir -p "$corpus"
  options=("-max_total_time=$seconds" -verbosity=0 -print_funcs=0 "-artifact_prefix=$build/$name-")
  echo "fuzz: $name for $seconds s"
  if [ "$name" = readers ]; then
    "$python" "$here/readers.py" "${options[@]}" -max_len=4096 "$corpus" "$here/corpus"
  else
    "$target" "${options[@]}" -max_len=4096 "$corpus"
  fi
done
