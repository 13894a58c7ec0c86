"""The daemon as root of a user namespace, the shape of a rootless container: an ordinary user to the machine."""

import sys
from pathlib import Path

import pytest

from support.vm.user_daemon import USER, UserDaemon

WRITE_AND_COMPARE = """
import os, sys
assert os.getuid() == 0, "no root here"
fd = os.open(sys.argv[1], os.O_RDWR | os.O_SYNC)
data = os.urandom(1 << 20)
assert os.pwrite(fd, data, 1 << 20) == len(data)
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
assert os.pread(fd, len(data), 1 << 20) == data
"""


@pytest.mark.long
@pytest.mark.one_kernel("7.3")
def test_root_of_a_user_namespace_serves_a_disk_that_it_may_not_mount() -> None:
    with UserDaemon(as_root_of_namespace=True).life() as user:
        path = user.add("vol", "memory", {"size": "8M"}).path
        assert path is not None and Path(path).stat().st_uid == USER
        ran = user.run(sys.executable, "-c", WRITE_AND_COMPARE, path)
        assert ran.returncode == 0, ran
        made = user.run("mkfs.ext4", "-q", path)
        assert made.returncode == 0, made
        mounted = user.run("unshare", "-m", "mount", path, str(user.home))
        assert mounted.returncode != 0 and "permission denied" in mounted.stderr, mounted
        user.delete("vol")
