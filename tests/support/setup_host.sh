#!/bin/bash
# Install the Debian packages that building, testing and the guest need: only missing ones, as root or with sudo.
# Owns the list.  Prints nothing and needs no rights when all are installed.
set -euo pipefail
# shellcheck source=tests/support/install_missing.sh
source "$(dirname "$0")/install_missing.sh"

packages=(
    # to build the C modules and the virtual environment
    gcc libc6-dev liburing-dev python3-dev python3-venv
    # to build the C examples
    libzmq3-dev
    # to fuzz the C modules
    clang
    # programs that the tests run
    curl dmsetup e2fsprogs fdisk fio iproute2 kmod procps systemd util-linux xfsprogs
    # to build the Debian package
    debhelper dpkg-dev
    # the servers that backends are tested against, and a backend's library
    libnbd0 nbdkit nbdkit-plugin-python librados2 libradosstriper1 librbd1
    # to fetch and verify the guests' kernels
    ca-certificates debian-archive-keyring debootstrap gpgv xz-utils
)
# Debian 12's own QEMU miscomputes in the guest; these are the libraries of the QEMU from its backports.
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
# The keyring package of an early Debian 12 lacks the keys of Debian 13, whose kernels the guests boot.
if ! compgen -G '/usr/share/keyrings/debian-archive-trixie-*' > /dev/null; then missing+=(debian-archive-keyring); fi
install_packages setup "${missing[@]}"

# The package's name contains clang's version, known once clang is installed.
mapfile -t missing < <(missing_packages "libclang-rt-$(clang -dumpversion | cut -d. -f1)-dev")
install_packages setup "${missing[@]}"

# Ceph's servers and commands for the tests, unpacked rather than installed: the packages would start services (smartd,
# ceph-crash), add a user and bring LVM.  The version is that of the libraries, with which they share an interface.
ceph_cache="${UBLKPOOL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}}/ublkpool-ceph"
ceph_version() { dpkg-query -W -f '${Version}' librados2; }
if [ ! -d "$ceph_cache/$(ceph_version)" ]; then
    mkdir -p "$ceph_cache"
    exec 9> "$ceph_cache/lock"
    flock 9
fi
if [ ! -d "$ceph_cache/$(ceph_version)" ]; then
    # The servers' libraries have other names in each release; these three are upgraded to what the archive has.
    mapfile -t libraries < <(apt-cache depends ceph-mon ceph-osd | sed -n 's/^ *Depends: \(lib[^ ]*\)$/\1/p' | sort -u)
    mapfile -t missing < <(missing_packages "${libraries[@]}")
    install_packages setup librados2 libradosstriper1 librbd1 "${missing[@]}"
    version=$(ceph_version)
    echo "setup: unpacking Ceph $version into $ceph_cache"
    partial=$(mktemp -d "$ceph_cache/partial.XXXXXX")
    trap 'rm -rf "$partial"' EXIT
    mkdir "$partial/root"
    unpacked=(ceph-mon ceph-osd ceph-base ceph-common)
    (cd "$partial" && apt-get download -qq -o APT::Sandbox::User=root "${unpacked[@]/%/=$version}")
    for package in "$partial"/*.deb; do dpkg -x "$package" "$partial/root"; done
    rm -rf "$ceph_cache"/[0-9]*
    mv -T "$partial/root" "$ceph_cache/$version"
fi
