"""The machine that the systemd tests boot: units, users, backing files, fstab, and the script that a boot runs.

Owns the root's content besides the product; `checks.py` runs in it.
"""

import shutil
from pathlib import Path

import h11
import prometheus_client

from support.systemd.boots import Script, start_with_script, write
from support.systemd.root import inside

CHECKS = Script(
    "support.systemd.checks",
    "/opt/ublkpool/bin/python",
    (
        *("systemd/checks.py", "systemd/devices.py", "systemd/facts.py", "systemd/stacks.py"),
        "systemd/user_session.py",
    ),
)
CONFIG = """\
[daemon]
group = "ublkpool"

[metrics]
listen = "127.0.0.1:9847"

# Its backend is of another user, its file system is in fstab.
[[device]]
name = "vol0"
id = 0

# Its backend is root's, its file system is mounted by hand.
[[device]]
name = "vol1"
id = 1

# The daemon runs its backend, as a user of its own.
[[device]]
name = "vol2"
id = 2

[device.backend]
kind = "file"
path = "/var/lib/vol2/vol2.img"
size = "64M"
user = "vol2"

# Its backend never ends opening.
[[device]]
name = "stuck"
id = 3
size = "64M"

[device.backend]
kind = "/root/stuck.py"
"""
STUCK = """\
import time


def open() -> None:
    time.sleep(100000)


def get_size() -> int:
    return 64 << 20


def pread(buf: memoryview, offset: int) -> None:
    raise OSError("it was never opened")
"""
# The timeout counts from the beginning of the boot; in a guest on a busy machine the daemon takes minutes to start.
FSTAB = "/dev/ublkpool/vol0 /srv/vol0 ext4 _netdev,x-systemd.device-timeout=600 0 0\n"


def prepare(root: Path) -> None:
    """Install units, users and files into a root that has the product.  Raises `CacheError`."""
    write(root / "etc/ublkpool/ublkpool.toml", CONFIG)
    write(root / "root/stuck.py", STUCK)
    write(root / "etc/fstab", FSTAB)
    for name in ("vol0", "vol1"):
        write(
            root / f"etc/ublkpool/backends/{name}.conf", f"KIND=file\nOPTIONS=path=/var/lib/{name}/disk.img\n"
        )
    # Of Python alone: the same files serve the guest's Python.
    (packages,) = (root / "opt/ublkpool/lib").glob("python*/site-packages")
    for each in (h11, prometheus_client):
        source = Path(str(each.__file__)).parent
        shutil.copytree(source, packages / source.name)
    user = "[Service]\nUser=vol0\nSupplementaryGroups=ublkpool\n"
    write(root / "etc/systemd/system/ublkpool-backend@vol0.service.d/user.conf", user)
    start_with_script(root)
    inside(
        root,
        "useradd --system --groups ublkpool vol0",
        # The daemon itself makes its backends members of the group.
        "useradd --system vol2",
        "mkdir -p /srv/vol0 /var/lib/vol0 /var/lib/vol1 /var/lib/vol2",
        "for each in vol0 vol1; do truncate -s 96M /var/lib/$each/disk.img; done",
        # With lazy initialization the kernel writes to the disk on its own, which would spoil the count of writes.
        "for each in vol0 vol1; do mkfs.ext4 -q -E lazy_itable_init=0 /var/lib/$each/disk.img; done",
        "chown -R vol0 /var/lib/vol0",
        "chown vol2 /var/lib/vol2",
        "systemctl --quiet enable ublkpool ublkpool-backend@vol0 ublkpool-backend@vol1 2>&1",
    )
