"""What the ublk driver refused, in words that say what to do about it."""

import errno
import os

_HINTS = {
    errno.ENOENT: "the ublk driver is not loaded: modprobe ublk_drv (Linux 6.12 or newer with CONFIG_BLK_DEV_UBLK)",
    errno.ENXIO: "the ublk driver is not loaded: modprobe ublk_drv (Linux 6.12 or newer with CONFIG_BLK_DEV_UBLK)",
    errno.EACCES: "run as root, or give this user /dev/ublk-control",
    errno.EPERM: "run as root (CAP_SYS_ADMIN)",
    errno.ENOSYS: "this kernel has no io_uring, or kernel.io_uring_disabled is set",
}


class UblkError(Exception):
    """A control command or an open that the kernel refused; `errno` is the kernel's (positive)."""

    def __init__(self, what: str, code: int) -> None:
        self.what = what
        self.errno = code
        hint = _HINTS.get(code)
        super().__init__(f"{what}: {os.strerror(code)}" + (f": {hint}" if hint else ""))


class UnsupportedError(UblkError):
    """This kernel's driver lacks what was asked for."""

    def __init__(self, text: str) -> None:
        self.what = text
        self.errno = errno.EOPNOTSUPP
        Exception.__init__(self, text)
