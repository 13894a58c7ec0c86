#!/bin/bash
# Install the Debian packages that building, testing and the guest need: only those missing, as root or by sudo.
# Owns that list. Says nothing and needs no rights when nothing is missing.
set -euo pipefail
# shellcheck source=tests/support/install_missing.sh
source "$(dirname "$0")/install_missing.sh"

packages=(
    # the C modules and the virtual environment
    gcc libc6-dev liburing-dev python3-dev python3-venv
    # the C examples
    libzmq3-dev
    # what fuzzes the C modules
    clang
    # what the tests call
    curl dmsetup e2fsprogs fdisk fio iproute2 kmod procps util-linux xfsprogs
    # the sources of some backends, and the library of one
    libnbd0 nbdkit
    # what fetching and checking the guests needs
    ca-certificates debian-archive-keyring debootstrap gpgv xz-utils
)
# Debian 12's own QEMU is not fit for the guest; this is what the one from its backports links to.
qemu_libraries=(
    libaio1 libbpf1 libcap-ng0 libcapstone4 libfdt1 libfuse3-3 libglib2.0-0 libgnutls30 libibverbs1
    libjpeg62-turbo libnuma1 libpixman-1-0 libpmem1 libpng16-16 librdmacm1 libsasl2-2 libseccomp2 libslirp0
    libudev1 liburing2 libvdeplug2 libzstd1
)

on_debian_only setup "${packages[@]}"
# shellcheck source=/dev/null
source /etc/os-release
if [ "${VERSION_ID:-999}" = 12 ]; then
    packages+=("${qemu_libraries[@]}")
else
    packages+=(qemu-system-x86 virtiofsd)
fi

mapfile -t missing < <(missing_packages "${packages[@]}")
# An early Debian 12 has the keyring, but not yet the keys of 13, from which the kernels come.
if ! compgen -G '/usr/share/keyrings/debian-archive-trixie-*' > /dev/null; then missing+=(debian-archive-keyring); fi
install_packages setup "${missing[@]}"

# Its name has the version of clang in it.
mapfile -t missing < <(missing_packages "libclang-rt-$(clang -dumpversion | cut -d. -f1)-dev")
install_packages setup "${missing[@]}"
