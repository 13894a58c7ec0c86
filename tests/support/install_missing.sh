# Functions for scripts that install Debian packages: only missing ones, as root or with sudo.
# They print nothing and need no rights when all are installed.  shellcheck shell=bash

# PACKAGE...: print those that are not installed, one a line.
missing_packages() {
    local package state
    for package in "$@"; do
        state=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2> /dev/null || true)
        if [ "$state" != installed ]; then echo "$package"; fi
    done
}

# CALLER PACKAGE...: install the packages, if there are any; CALLER begins the message.
install_packages() {
    local caller=$1 as_root=()
    shift
    if [ $# -eq 0 ]; then return; fi
    if [ "$(id -u)" != 0 ]; then as_root=(sudo); fi
    echo "$caller: installing $*"
    "${as_root[@]}" apt-get update -qq
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" > /dev/null
}

# CALLER PACKAGE...: end the script, with a message that names the packages, on a machine without dpkg.
on_debian_only() {
    local caller=$1
    shift
    if ! command -v dpkg-query > /dev/null; then
        echo "$caller: not a Debian machine; if something is missing, these are the packages: $*" >&2
        exit 0
    fi
}
