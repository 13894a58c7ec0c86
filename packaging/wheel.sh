#!/bin/bash
# Build the source distribution and the wheel of this tree into the folder $1.
# auditwheel marks the wheel with the oldest C library that it runs with, and puts liburing into it unless it is linked in.
set -euo pipefail
out=$(realpath -m "$1") python=${PYTHON:-python3}
cd "$(dirname "$0")/.."
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT
quietly() { "$@" > "$made/log" 2>&1 || { cat "$made/log" >&2; return 1; }; }

# Without isolation: the build tools are installed, and would be fetched each time.  A Python that was built by hand may link
# modules with its own library directory as their search path, which a wheel must not name.
export LDSHARED="${CC:-gcc} -shared"
quietly env -u UBLKPOOL_CHECKED "$python" -m build --no-isolation --outdir "$made" .
mkdir -p "$out"
cp "$made"/*.tar.gz "$out"
if ! quietly env PATH="$(dirname "$python"):$PATH" "$python" -m auditwheel repair --wheel-dir "$out" "$made"/*.whl; then
    echo "wheel: auditwheel cannot mark it; this wheel runs with this system's C library, and needs its liburing.so.2" >&2
    cp "$made"/*.whl "$out"
fi
