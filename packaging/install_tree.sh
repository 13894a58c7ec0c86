#!/bin/bash
# Fill the folder $1, the root of the Debian package; debian/rules runs this in the tree.
#
# /usr/lib/ublkpool is a virtual environment on Debian's Python: the daemon starts all of its processes with the Python that
# runs it, so all of them find the same packages.  What does not depend on the Python's version is in `modules`.
set -euo pipefail
root=$(realpath -m "$1") home=/usr/lib/ublkpool
environment=$root$home modules=$root$home/modules
: "${PYTHON:?}" "${WHEEL:?is the wheel of packaging/wheel.sh}" "${VENDORED:?is the folder of packaging/vendored.sh}"
machine=$(uname -m)
mapfile -t pythons < packaging/pythons.txt

# Isolated: nothing but what was fetched, whatever pip is configured to.
install_wheels() {  # INTO ARGUMENT...
    "$PYTHON" -m pip install --isolated -q --disable-pip-version-check --root-user-action=ignore --no-deps --no-index --no-compile \
        --target "$1" "${@:2}"
}

mkdir -p "$environment/bin" "$root/usr/bin" "$root/usr/share"
printf 'home = /usr/bin\ninclude-system-site-packages = false\n' > "$environment/pyvenv.cfg"
ln -s ../../../bin/python3 "$environment/bin/python"
cat > "$environment/bin/ublkpool" << EOF
#!$home/bin/python
from ublkpool.daemon.cli.commands import main

main()
EOF
chmod 755 "$environment/bin/ublkpool"
ln -s ../lib/ublkpool/bin/ublkpool "$root/usr/bin/ublkpool"

echo "ublkpool and what runs with each Python"
install_wheels "$modules" "$WHEEL" "$VENDORED"/{click,h11,obstore,prometheus_client,pycparser}-*.whl
mv "$modules/share/ublkpool" "$root/usr/share/ublkpool"
rm -r "$modules/share" "$modules/bin"
platforms=()
for tag in manylinux2014 manylinux_2_{5,17,26,28}; do platforms+=(--platform "${tag}_$machine"); done
for version in "${pythons[@]}"; do
    echo "what is compiled for Python $version"
    packages=$environment/lib/python$version/site-packages
    install_wheels "$packages" --only-binary=:all: --implementation cp --python-version "$version" "${platforms[@]}" \
        --find-links "$VENDORED" cffi msgspec posix_ipc pyzmq
    echo $home/modules > "$packages/modules.pth"
    # Sources that pip leaves beside what was compiled of them.
    find "$packages" -name '*.pyx' -delete -o -name '*.pxd' -delete -o -name '*.h' -delete
    rm -rf "$packages/bin" "$packages"/zmq/tests
done

echo "units, rules, config"
units=$root/usr/lib/systemd/system
share=$root/usr/share/ublkpool
install -D -m 644 -t "$units" config/*.service
users=$root/usr/lib/systemd/user
install -D -m 644 config/ublkpool.service.user "$users/ublkpool.service"
# The package's own command: systemd would find one in /usr/local/bin first.
sed -E -i 's,^(Exec[A-Za-z]+=[-+!:@]*)ublkpool ,\1/usr/bin/ublkpool ,' "$units"/*.service "$users"/*.service
install -D -m 644 -t "$root/usr/lib/udev/rules.d" config/99-ublkpool.rules
install -D -m 644 config/ublkpool.toml "$root/etc/ublkpool/ublkpool.toml"
mkdir -p "$root/etc/ublkpool/backends"
# They are where systemd and udev find them.  The rules for ordinary users are for the administrator to install.
rm "$share"/*.service "$share"/*.service.user "$share"/99-ublkpool.rules

echo "documents"
docs=$root/usr/share/doc/ublkpool
mkdir -p "$docs"
cp -r README.md CHANGELOG.md SECURITY.md docs/. "$docs"
ln -s ../../ublkpool/examples "$docs/examples"

echo "man pages and completion"
export PYTHONPATH=$modules PYTHONDONTWRITEBYTECODE=1
mkdir -p "$root/usr/share/man/man1"
"$PYTHON" packaging/man_pages.py "$root/usr/share/man/man1"
completion() {  # SHELL FILE
    mkdir -p "$(dirname "$root/usr/share/$2")"
    _UBLKPOOL_COMPLETE=$1_source "$PYTHON" -c 'from ublkpool.daemon.cli.commands import main; main()' > "$root/usr/share/$2"
    test -s "$root/usr/share/$2"
}
completion bash bash-completion/completions/ublkpool
completion zsh zsh/vendor-completions/_ublkpool
completion fish fish/vendor_completions.d/ublkpool.fish
