#!/bin/bash
# Install the Debian packages that the benchmark needs beyond those of the tests: only those missing, as root or by sudo.
# Owns that list. Says nothing and needs no rights when nothing is missing.
set -euo pipefail
# shellcheck source=tests/support/install_missing.sh
source "$(dirname "$0")/../tests/support/install_missing.sh"

# The peers that Debian has, what attaches them (qemu-block-extra: rbd for qemu-nbd), the backend nbd's library, and what counts instructions.
packages=(libnbd0 mount nbd-client nbdkit nbdkit-plugin-python qemu-block-extra qemu-utils rbd-nbd valgrind)

on_debian_only bench "${packages[@]}"
mapfile -t missing < <(missing_packages "${packages[@]}")
install_packages bench "${missing[@]}"
