#!/bin/bash
# Fetch the wheels that the Debian package brings along into the cache, unless they are there; print their folder.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3} machine=$(uname -m)
if [ "$machine" != x86_64 ]; then
    echo "deb: packaging/vendored.txt has wheels for x86_64, and this machine is $machine: build the package on x86_64" >&2
    exit 1
fi
mapfile -t pythons < "$here/pythons.txt"
cache=${UBLKPOOL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}}/ublkpool-vendored
folder=$cache/$(cat "$here/vendored.txt" "$here/pythons.txt" | sha256sum | cut -c1-12)-$machine

if [ ! -d "$folder" ]; then
    echo "deb: fetching the wheels of packaging/vendored.txt" >&2
    mkdir -p "$cache"
    partial=$(mktemp -d "$cache/partial.XXXXXX")
    trap 'rm -rf "$partial"' EXIT
    platforms=()
    for tag in manylinux2014 manylinux_2_{5,17,26,28}; do platforms+=(--platform "${tag}_$machine"); done
    for version in "${pythons[@]}"; do
        "$python" -m pip download -q --retries 10 --disable-pip-version-check --no-deps --dest "$partial" --only-binary=:all: \
            --implementation cp --python-version "$version" "${platforms[@]}" --require-hashes -r "$here/vendored.txt" >&2
    done
    chmod 755 "$partial"
    # Another build may have fetched them meanwhile.
    if ! moved=$(mv -T "$partial" "$folder" 2>&1) && [ ! -d "$folder" ]; then
        echo "deb: the fetched wheels have no place in the cache: $moved: set UBLKPOOL_CACHE to another folder" >&2
        exit 1
    fi
fi
echo "$folder"
