#!/bin/bash
# Install the Debian packages that judge ours, with LONG=1: only those missing, as root or by sudo.
# Owns that list. Says nothing and needs no rights when nothing is missing.
set -euo pipefail
# shellcheck source=tests/support/install_missing.sh
source "$(dirname "$0")/../support/install_missing.sh"

packages=(lintian)

on_debian_only package "${packages[@]}"
mapfile -t missing < <(missing_packages "${packages[@]}")
install_packages package "${missing[@]}"
