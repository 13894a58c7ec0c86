# Sourced by the scripts that name the packages: installs those that are missing, as root or by sudo.
# Says nothing and needs no rights when nothing is missing.  shellcheck shell=bash

# The packages of the arguments that are not installed, a line each.
missing_packages() {
    local package state
    for package in "$@"; do
        state=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2> /dev/null || true)
        if [ "$state" != installed ]; then echo "$package"; fi
    done
}

# WHO PACKAGE...: without packages there is nothing to do.
install_packages() {
    local who=$1 as_root=()
    shift
    if [ $# -eq 0 ]; then return; fi
    if [ "$(id -u)" != 0 ]; then as_root=(sudo); fi
    echo "$who: installing $*"
    "${as_root[@]}" apt-get update -qq
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" > /dev/null
}

# WHO PACKAGE...: ends the script where there is no dpkg to ask.
on_debian_only() {
    local who=$1
    shift
    if ! command -v dpkg-query > /dev/null; then
        echo "$who: not a Debian machine; if something is missing, these are the packages: $*" >&2
        exit 0
    fi
}
