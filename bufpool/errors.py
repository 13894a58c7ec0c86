"""The errors of the pool and the SDK; every one carries the errno that a block request would be answered with."""

import errno


class PoolError(Exception):
    """A failure with a one-line reason that is fit to be shown to a user as it stands."""

    errno = errno.EIO


class WireError(PoolError):
    """Bytes that are not what the wire format allows."""

    errno = errno.EPROTO


class AttachRefused(PoolError):
    """The daemon declined to attach this backend; the text is its reason."""

    errno = errno.EPERM


class BackendError(PoolError):
    """A backend that cannot be used: bad option, missing file, unusable size.

    The text names the option or file and the way out; the command line prints it and exits with status 2.
    """

    errno = errno.EINVAL
