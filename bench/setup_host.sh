#!/bin/bash
# Install the Debian packages that the benchmark needs beyond those of the tests: only those missing, as root or by sudo.
# Owns that list. Says nothing and needs no rights when nothing is missing.
set -euo pipefail

# The peers that Debian has, what attaches them, and what counts instructions.
packages=(mount nbd-client nbdkit nbdkit-plugin-python valgrind)

if ! command -v dpkg-query > /dev/null; then
    echo "bench: not a Debian machine; if something is missing, these are the packages: ${packages[*]}" >&2
    exit 0
fi
missing=()
for package in "${packages[@]}"; do
    state=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2> /dev/null || true)
    if [ "$state" != installed ]; then missing+=("$package"); fi
done
if [ ${#missing[@]} -eq 0 ]; then exit 0; fi

as_root=()
if [ "$(id -u)" != 0 ]; then as_root=(sudo); fi
echo "bench: installing ${missing[*]}"
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends "${missing[@]}" > /dev/null
