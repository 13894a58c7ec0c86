"""Errors of the ublk driver, with what to do about each."""

import errno
import os
from contextlib import suppress
from pathlib import Path

_HINTS = {
    errno.ENOENT: "the ublk driver is not loaded: modprobe ublk_drv (Linux 6.12 or newer with CONFIG_BLK_DEV_UBLK)",
    errno.ENXIO: "the ublk driver is not loaded: modprobe ublk_drv (Linux 6.12 or newer with CONFIG_BLK_DEV_UBLK)",
    errno.EACCES: "run as root, or have root install config/99-ublkpool.users.rules, which lets a group of users in",
    errno.EPERM: "run as root (CAP_SYS_ADMIN)",
    errno.ENOSYS: "this kernel has no io_uring (CONFIG_IO_URING), or a seccomp filter forbids it",
    errno.EMFILE: "start it with a higher limit of open files (ulimit -n, LimitNOFILE= in its unit)",
    errno.ENFILE: "the whole machine has as many files open as fs.file-max lets it: raise it with sysctl",
}
_IO_URING_DISABLED = Path("/proc/sys/kernel/io_uring_disabled")
_IO_URING_HINTS = {
    "1": "io_uring is for CAP_SYS_ADMIN and one group (kernel.io_uring_disabled = 1): run as root, or in the group "
    "whose number is kernel.io_uring_group",
    "2": "io_uring is forbidden on this machine (kernel.io_uring_disabled = 2): sysctl kernel.io_uring_disabled=0 "
    "allows it",
}


def _hint(code: int) -> str | None:
    """The control commands travel over io_uring, and EPERM may be io_uring_setup(2)'s."""
    if code == errno.EPERM:
        with suppress(OSError, KeyError):
            return _IO_URING_HINTS[_IO_URING_DISABLED.read_text().strip()]
    return _HINTS.get(code)


class UblkError(Exception):
    """A control command or an open that the kernel refused; `errno` is the kernel's (positive)."""

    def __init__(self, what: str, code: int) -> None:
        self.what = what
        self.errno = code
        hint = _hint(code)
        super().__init__(f"{what}: {os.strerror(code)}" + (f": {hint}" if hint else ""))


class UnsupportedError(UblkError):
    """This kernel's driver lacks what was asked for."""

    def __init__(self, text: str) -> None:
        self.what = text
        self.errno = errno.EOPNOTSUPP
        Exception.__init__(self, text)
