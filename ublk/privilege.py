"""Whether the driver takes this process for a privileged one.

The driver asks `capable(CAP_SYS_ADMIN)`, which is about the kernel's first user namespace: root of another one, such as
a rootless container's, is an ordinary user to it.  The devices of an ordinary user are *user devices*
(`Feature.UNPRIVILEGED_DEV`): they belong to that user, have no recovery, and are named in every command by the path of
their node.
"""

import functools
import re
from pathlib import Path

_CAP_SYS_ADMIN = 21
_FIRST_USER_NAMESPACE = 0xEFFFFFFD
"""Its inode (PROC_USER_INIT_INO, include/linux/proc_ns.h)."""
_CAPABILITIES = re.compile(r"^CapEff:\s*([0-9a-f]+)$", re.MULTILINE)


@functools.cache
def is_privileged() -> bool:
    """Whether this process has CAP_SYS_ADMIN in the first user namespace; asked once, and its forks inherit it."""
    found = _CAPABILITIES.search(Path("/proc/self/status").read_text())
    has_capability = found is not None and bool(int(found[1], 16) >> _CAP_SYS_ADMIN & 1)
    return has_capability and not is_in_user_namespace()


def is_in_user_namespace() -> bool:
    """Whether this process is in a user namespace other than the first one."""
    return Path("/proc/self/ns/user").stat().st_ino != _FIRST_USER_NAMESPACE
