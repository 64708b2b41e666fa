#!/usr/bin/env bash
# Runs the commands of README.md as they are written there, and compares its C++ with examples/generate.cc.
#
#   readme_test.sh CHECKOUT BUILD
#
# Every fenced block of the language sh is a test, unless the line above it is the comment
# <!-- not run by tests/readme_test.sh: reason -->. A block runs in a scratch folder that looks like the
# checkout, in which build/release is the build under test.
set -euo pipefail
checkout=$(realpath "$1")
build=$(realpath "$2")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Writes the blocks of a language, one file each, to $scratch/blocks.
blocks() { # LANGUAGE
  rm -rf "$scratch/blocks" && mkdir "$scratch/blocks"
  awk -v language="$1" -v folder="$scratch/blocks" '
    /^```/ && inside { inside = 0; next }
    /^```/ { wanted = substr($0, 4) == language && previous !~ /^<!-- not run by tests\/readme_test.sh: .+ -->$/
             inside = 1; file = sprintf("%s/%04d", folder, NR) }
    inside && !/^```/ && wanted { print > file }
    { previous = $0 }' "$checkout/README.md"
}

mkdir -p "$scratch/krait/build"
cd "$scratch/krait"
for path in "$checkout"/*; do
  [[ $(basename "$path") == build ]] || ln -s "$path" .
done
ln -s "$build" build/release
export HF_HUB_OFFLINE=1 HF_HUB_CACHE="$scratch/cache"

blocks sh
ran=0
for block in "$scratch"/blocks/*; do
  [[ -e $block ]] || break
  echo "--- README.md:$((10#$(basename "$block") + 1))"
  cat "$block"
  bash -euo pipefail "$block" >"$scratch/output" 2>&1 || { cat "$scratch/output"; echo "failed"; exit 1; }
  [[ -s $scratch/output ]] || { echo "printed nothing"; exit 1; }
  ran=$((ran + 1))
done
((ran >= 1)) || { echo "README.md has no command to run"; exit 1; }

blocks cpp
compared=0
for block in "$scratch"/blocks/*; do
  [[ -e $block ]] || break
  [[ $(<"$checkout/examples/generate.cc") == *"$(<"$block")"* ]] ||
    { cat "$block"; echo "this C++ of README.md is not in examples/generate.cc"; exit 1; }
  compared=$((compared + 1))
done
((compared >= 1)) || { echo "README.md has no C++ to compare"; exit 1; }
echo "$ran commands run, $compared programs compared"
