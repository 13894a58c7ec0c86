#!/bin/bash
# [SECONDS]: fuzz everything that another process sends, SECONDS (60) in all, shared by the targets and spread over the
# CPUs.  A finding ends the run with status 1 and says how to play it again.
#
# The C targets are built with the sources that they test, by clang: libFuzzer, AddressSanitizer (with leaks) and UBSan,
# the core with its invariants asserted.  tests/fuzz/corpus has the inputs that reach all that was ever reached: they are
# played first.  The Python targets are those of tests/sim/test_fuzz.py, played with one seed after the other.
#
# KEEP=1 adds to the corpus the inputs that reach code which no other input reaches.
set -euo pipefail
cd "$(dirname "$0")/../.."
seconds=${1:-60}
cpus=$(nproc)
targets=(queue_frames queue_rings engine_frames engine_rings python)
each=$((seconds * cpus / ${#targets[@]}))
((each > 0)) || each=1
directory=$PWD/.venv/fuzz
findings=$PWD/.venv/fuzz/findings
mkdir -p "$directory" "$findings"

# NAME SOURCE 0|1 FILE...
build() {
    local name=$1 source=$2 rings=$3
    shift 3
    clang -g -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined -std=gnu11 -D_GNU_SOURCE \
        -DUQ_CHECKED -DRINGS="$rings" -I ublk/csrc -I bufpool/engine/csrc -I bufpool/wire/csrc \
        -o "$directory/$name" "tests/fuzz/$source" "$@" -luring
}

# NAME: new inputs land in a directory of their own, so that the corpus changes only with KEEP=1.
play() {
    local name=$1 reached=$directory/reached-$1
    rm -rf "$reached"
    mkdir -p "$reached"
    if "$directory/$name" -max_total_time="$each" -max_len=1024 -len_control=0 -timeout=120 -print_final_stats=1 -verbosity=0 \
        -artifact_prefix="$findings/$name-" "$reached" "tests/fuzz/corpus/$name" > "$directory/$name.log" 2>&1; then
        echo "fuzz: $name: $(sed -n 's/^stat::number_of_executed_units: *//p' "$directory/$name.log") inputs, no finding"
        return
    fi
    grep -E -A 12 'ERROR|runtime error|must hold' "$directory/$name.log" | head -n 30
    for finding in "$findings/$name-"*; do
        [ -e "$finding" ] || continue
        echo "fuzz: $name: play it again: $directory/$name $finding"
        echo "fuzz: $name: its input in base64: $(base64 -w 0 "$finding")"
    done
    return 1
}

play_python() {
    local end=$((SECONDS + each)) seed=${UBLKPOOL_FUZZ_SEED:-$RANDOM} rounds=0
    while ((rounds == 0 || SECONDS < end)); do
        if ! UBLKPOOL_FUZZ_SEED=$seed UBLKPOOL_FUZZ_FACTOR=0.05 .venv/bin/python -m pytest -q -x -p no:cacheprovider \
            tests/sim/test_fuzz.py > "$directory/python.log" 2>&1; then
            tail -n 30 "$directory/python.log"
            echo "fuzz: python: play it again:" \
                "UBLKPOOL_FUZZ_SEED=$seed UBLKPOOL_FUZZ_FACTOR=0.05 .venv/bin/python -m pytest -x tests/sim/test_fuzz.py"
            return 1
        fi
        seed=$((seed + 100))
        rounds=$((rounds + 1))
    done
    echo "fuzz: python: $rounds rounds, no finding"
}

core=()
for source in ublk/csrc/queue_*.c; do
    # The queue's io_uring; the fuzzed core has none.
    [ "$source" = ublk/csrc/queue_ring.c ] || core+=("$source")
done
build queue_frames queue.c 0 "${core[@]}" &
frames=$!
build queue_rings queue.c 1 "${core[@]}" &
rings=$!
wait $frames
wait $rings
build engine_frames engine.c 0 bufpool/engine/csrc/*.c &
frames=$!
build engine_rings engine.c 1 bufpool/engine/csrc/*.c &
rings=$!
wait $frames
wait $rings

begun=()
for name in "${targets[@]}"; do
    # Only a pause: of jobs that end at the same moment `wait -n` reports one.
    if ((${#begun[@]} >= cpus)); then wait -n || true; fi
    if [ "$name" = python ]; then play_python & else play "$name" & fi
    begun+=($!)
done
status=0
for job in "${begun[@]}"; do wait "$job" || status=1; done

if [ "${KEEP:-0}" = 1 ] && [ $status = 0 ]; then
    for name in "${targets[@]}"; do
        [ "$name" = python ] && continue
        merged=$directory/merged-$name
        rm -rf "$merged"
        mkdir -p "$merged"
        "$directory/$name" -merge=1 -use_counters=0 -max_len=1024 "$merged" "tests/fuzz/corpus/$name" "$directory/reached-$name" \
            > /dev/null 2>&1
        rm -rf "tests/fuzz/corpus/$name"
        mv "$merged" "tests/fuzz/corpus/$name"
    done
fi
exit $status
