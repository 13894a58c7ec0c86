#!/bin/bash
# Build the Debian package into the folder $1, which has the wheel of this tree (packaging/wheel.sh).
set -euo pipefail
out=$(realpath "$1")
here=$(cd "$(dirname "$0")" && pwd)
export PYTHON=${PYTHON:-python3} WHEEL VENDORED
PYTHON=$(command -v "$PYTHON")
WHEEL=$(echo "$out"/ublkpool-*.whl)
VENDORED=$("$here/vendored.sh")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# dpkg-buildpackage writes beside and into the tree.
mkdir "$work/tree"
cd "$here/.."
cp -r debian packaging config docs examples LICENSE README.md CHANGELOG.md SECURITY.md "$work/tree"
cd "$work/tree"
# -d: the build tools are those of the virtual environment, not Debian's.
if ! dpkg-buildpackage -b -us -uc -d > "$work/log" 2>&1; then cat "$work/log" >&2; exit 1; fi
cp "$work"/ublkpool_*.deb "$out"
