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

# The package's files get this time, by which a daemon tells the code of its workers from its own.  It is the commit's, so that
# a commit makes one package, and now for a tree with changes; the time in debian/changelog would be that of all commits.
cd "$here/.."
commit_s=
if [ -e .git ] && [ -z "$(git status --porcelain 2>&1)" ]; then commit_s=$(git log -1 --format=%ct); fi
export SOURCE_DATE_EPOCH=${commit_s:-$(date +%s)}

# dpkg-buildpackage writes beside and into the tree.
mkdir "$work/tree"
cp -r debian packaging config docs examples LICENSE README.md CHANGELOG.md SECURITY.md "$work/tree"
cd "$work/tree"
# -d: the build tools are those of the virtual environment, not Debian's.
if ! dpkg-buildpackage -b -us -uc -d > "$work/log" 2>&1; then cat "$work/log" >&2; exit 1; fi
cp "$work"/ublkpool_*.deb "$out"
