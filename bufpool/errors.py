"""The errors of the pool and the SDK; each has the errno that answers a block request that fails with it."""

import errno


class PoolError(Exception):
    """A failure whose text is one line, to be shown to the user as it is."""

    errno = errno.EIO


class WireError(PoolError):
    """Bytes that the wire format does not allow."""

    errno = errno.EPROTO


class AttachRefused(PoolError):
    """The daemon refused to attach this backend; the text is its reason."""

    errno = errno.EPERM


class BackendError(PoolError):
    """A backend that cannot be used: an invalid option, a missing file, an unusable size.

    The text names the option or file and the way out; the command line prints it and exits with status 2.
    """

    errno = errno.EINVAL


class StoreTaken(BackendError):
    """Another client has taken the store over while this backend served it: no successor may serve the device."""

    errno = errno.ESHUTDOWN
