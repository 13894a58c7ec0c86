#!/bin/bash
# DIRECTORY: build the C modules for AddressSanitizer and UBSan, into a copy of the package, DIRECTORY/lib; the normal modules
# stay as they are.
set -euo pipefail
directory=$(realpath -m "$1")
cd "$(dirname "$0")/../.."

rm -rf "$directory/lib"
UBLKPOOL_CHECKED=1 \
    CFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g" \
    LDFLAGS="-fsanitize=address,undefined" \
    "$PWD/.venv/bin/python" setup.py -q build --build-base "$directory/build" --build-lib "$directory/lib"
