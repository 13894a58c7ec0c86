#!/bin/bash
# PYTEST_ARGUMENT...: run tests on C modules that AddressSanitizer and UBSan watch.  Any report, of the tests' process or
# of one that they start, fails the run.
# build_sanitized.sh builds these modules first.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$PWD/.venv/bin/python
directory=$PWD/.venv/sanitized
reports=$directory/reports

rm -rf "$reports"
mkdir -p "$reports"

# Without leak detection: CPython frees neither its modules nor its interned strings, and its frames are in the stack of
# each allocation of ours, so no suppression tells the two apart.  The fuzz targets (tests/fuzz), which run without
# Python, look for leaks.
#
# UBLKPOOL_FUZZ_FACTOR: `make fuzz` sends far more to the C code, and under these sanitizers, too.
# PYTHONMALLOC=malloc, unless the environment has another: Python's own allocator (pymalloc) packs objects of up to 512
# bytes without gaps, and a write past the end of one would go unnoticed.  It saves a third of the time.
status=0
env LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" \
    ASAN_OPTIONS="detect_leaks=0:log_path=$reports/asan" \
    UBSAN_OPTIONS="print_stacktrace=1:log_path=$reports/ubsan" \
    PYTHONMALLOC="${PYTHONMALLOC:-malloc}" UBLKPOOL_SANITIZED=1 \
    UBLKPOOL_FUZZ_FACTOR="${UBLKPOOL_FUZZ_FACTOR:-0.1}" \
    PYTHONPATH="$directory/lib:$PWD/tests" \
    "$python" -m support.spread --timeout 240 "$@" || status=$?

for report in "$reports"/*; do
    [ -e "$report" ] || continue
    echo "sanitized: $report:" >&2
    head -n 40 "$report" >&2
    status=1
done
exit $status
