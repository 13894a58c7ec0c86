"""The base class of layers: a backend over a backend, whose methods call those of the one below.

A layer overrides what it changes and calls `self.inner` for the rest.  Its methods are plain: they return when the
request is done.  They run on several threads if the backend below does (`Backend.parallel`).
"""

from collections.abc import Mapping

import msgspec

from ublkpool.bufpool.sdk.backend import Backend, Device, Hint, NoOptions, Properties

_BEHAVIOUR = ("parallel", "exclusive_bytes", "survives_death", "stores_data")


def behave_as(upper: Backend, lower: Backend) -> None:
    """Give the upper backend the threads and the promises of the lower one."""
    for name in _BEHAVIOUR:
        if hasattr(lower, name):
            setattr(upper, name, getattr(lower, name))


class Plain(Backend):
    """A backend whose methods return when they are done: what a layer stands on."""

    def open(self, hint: Hint) -> Properties:
        """See `Backend.open`."""
        raise NotImplementedError

    def started(self, device: Device) -> None:
        """See `Backend.started`."""

    def pread(self, buf: memoryview, offset: int) -> int | None:
        """See `Backend.pread`."""
        raise NotImplementedError

    def pwrite(self, buf: memoryview, offset: int, fua: bool) -> int | None:
        """See `Backend.pwrite`."""
        raise NotImplementedError

    def flush(self) -> None:
        """See `Backend.flush`."""

    def trim(self, offset: int, length: int) -> None:
        """See `Backend.trim`."""

    def zero(self, offset: int, length: int, may_unmap: bool) -> None:
        """See `Backend.zero`."""
        raise NotImplementedError

    def detached(self) -> None:
        """See `Backend.detached`."""

    def close(self) -> None:
        """See `Backend.close`."""


class Layer(Plain):
    """Passes everything on; override what shall be different."""

    def __init__(self, options: msgspec.Struct = NoOptions(), *, inner: Plain) -> None:  # noqa: B008 - frozen
        """`inner` is the layer or backend below."""
        super().__init__(options)
        self.inner = inner

    def open(self, hint: Hint) -> Properties:
        """Open what is below, and behave as it: same properties, threads and promises."""
        properties = self.inner.open(hint)
        behave_as(self, self.inner)
        return properties

    def started(self, device: Device) -> None:
        """See `Backend.started`."""
        self.inner.started(device)

    def pread(self, buf: memoryview, offset: int) -> int | None:
        """See `Backend.pread`."""
        return self.inner.pread(buf, offset)

    def pwrite(self, buf: memoryview, offset: int, fua: bool) -> int | None:
        """See `Backend.pwrite`."""
        return self.inner.pwrite(buf, offset, fua)

    def flush(self) -> None:
        """See `Backend.flush`."""
        self.inner.flush()

    def trim(self, offset: int, length: int) -> None:
        """See `Backend.trim`."""
        self.inner.trim(offset, length)

    def zero(self, offset: int, length: int, may_unmap: bool) -> None:
        """See `Backend.zero`."""
        self.inner.zero(offset, length, may_unmap)

    def detached(self) -> None:
        """See `Backend.detached`."""
        self.inner.detached()

    def close(self) -> None:
        """See `Backend.close`."""
        self.inner.close()

    def statistics(self) -> Mapping[str, int]:
        """See `Backend.statistics`."""
        return self.inner.statistics()
