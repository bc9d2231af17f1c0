#!/usr/bin/env bash
# Runs every fuzz target for SECONDS, each from the same first inputs in a folder of its own; fails when one crashes,
# leaks, hangs or takes too much memory, and keeps the input that did it in build/fuzz/found.
#   tests/fuzz/run.sh SECONDS [TARGET...]
set -uo pipefail
cd "$(dirname "$0")/../.."
seconds=${1:?seconds for each target}
shift
{ [ -f build/fuzz/build.ninja ] || cmake --preset fuzz >/dev/null; } && cmake --build --preset fuzz -j 2 | tail -n 1 ||
    exit 1

corpus=$(mktemp -d)
trap 'rm -rf "$corpus"' EXIT
python3 tests/fuzz/seeds.py "$corpus" || exit 1
mkdir -p build/fuzz/found
targets=("$@")
[ ${#targets[@]} -gt 0 ] || for folder in "$corpus"/*; do targets+=("$(basename "$folder")"); done

run_one() {
    local target=$1 log=$corpus/$1.log
    if LSAN_OPTIONS=suppressions=tests/lsan.supp:print_suppressions=0 build/fuzz/bin/f_"$target" "$corpus/$target" \
        -max_total_time="$seconds" -max_len=16384 -timeout=20 -rss_limit_mb=2048 -print_final_stats=1 \
        -artifact_prefix="build/fuzz/found/$target-" >"$log" 2>&1; then
        awk -v target="$target" '/^INFO: Seed:/ {seed = $3} /number_of_executed_units/ {n = $2}
             / cov: / {for (i = 1; i < NF; i++) if ($i == "cov:") edges = $(i + 1)}
             END {printf "f_%-12s %9d executions, %5d edges, seed %s\n", target, n, edges, seed}' "$log"
    else
        echo "f_$target: FAILED, $(grep -m 1 -o 'Seed: .*' "$log")"
        tail -n 60 "$log"
        return 1
    fi
}
export -f run_one
export corpus seconds
printf '%s\n' "${targets[@]}" | xargs -P 2 -I {} bash -c 'run_one {}'
