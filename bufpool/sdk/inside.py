"""Opening a store for a device's workers, which run its engine themselves (`isolation = "none"`).

The store is opened with the same locks and the same refusals as for a backend's process, in a process that ends then:
the descriptors go to the workers, and with a file's its lock, which the kernel keeps until the last worker and its I/O
are gone.

A store in a cluster has no descriptor: the worker connects to it itself (`Connect`), on a thread, after its fork.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple, Protocol, runtime_checkable

import msgspec

from ublkpool.bufpool.engine.device import Device
from ublkpool.bufpool.engine.native import NativeEngine, Storage
from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk.loader import load
from ublkpool.bufpool.sdk.options import Given
from ublkpool.bufpool.sdk.properties import Hint, Inside, Properties, check_properties
from ublkpool.bufpool.sdk.serving import attach_message
from ublkpool.bufpool.wire import Attach, Identity
from ublkpool.bufpool.wire.same_store import is_same_store


@runtime_checkable
class RunsInside(Protocol):
    """A backend whose native engine a device's workers can run."""

    def open_inside(self, hint: Hint, kept: int | None) -> Inside:
        """Open the store; `kept` is the descriptor of the memory that the daemon keeps of it, or None.

        Raises `BackendError`, `OSError`.
        """


@runtime_checkable
class Settles(Protocol):
    """A backend of this kind whose store has something left to be made durable once the workers are gone."""

    def settle(self) -> None:
        """Make all of the store durable.  Raises `BackendError`, `OSError`."""


@runtime_checkable
class ConnectsInside(Protocol):
    """A backend whose native engine a device's one worker can run, and whose store is a connection.

    The worker connects on a thread of its own.  The other methods are those of `Backend`, among them `resize`.
    """

    def callables(self) -> Mapping[str, Callable[..., Any]]:
        """See `Backend`."""

    def look(self, hint: Hint) -> Properties:
        """The store's properties, without its lock, in a process that ends then; `owner` is the hint's.

        Raises `BackendError`, `OSError`, also for a store that another client has.
        """

    def connect(self, hint: Hint) -> Properties:
        """As `Backend.open`, but give up soon if the cluster does not answer.  Raises `BackendError`, `OSError`."""

    def started(self, device: Device) -> None:
        """See `Backend`; on the same thread."""

    def engine(self, device: Device) -> NativeEngine:
        """See `Backend`; on the loop's thread."""

    def close(self) -> None:
        """See `Backend`."""


class Growth(NamedTuple):
    """How a store that workers serve is to grow; sizes in bytes."""

    bound: Identity
    """What the workers serve: nothing else may be grown, although it lies in the same place."""
    served_bytes: int
    wanted_bytes: int
    kept: int | None = None
    """The descriptor of the memory that the daemon keeps of it, or None."""


@runtime_checkable
class GrowsInside(Protocol):
    """A backend whose store can grow while a device's workers serve it, which alone have its lock."""

    def grow_inside(self, growth: Growth) -> None:
        """Make the store at least as large as is wanted, also after a power failure.

        Raises `BackendError`, `OSError`; then it is not smaller than before.
        """


class OpenStore(NamedTuple):
    """An open store: what its backend would attach with, and the descriptors of its files or its memory.

    Without a `storage` the worker connects to the store itself.
    """

    attach: Attach
    storage: Storage | None
    descriptors: tuple[int, ...]


class Connect(NamedTuple):
    """How a worker connects to its store, complete before the fork."""

    kind: str
    options: Given
    cwd: str | None
    hint: Hint
    generation: int

    def backend(self) -> ConnectsInside:
        """The backend, not connected yet; this process's directory is its own from now on.  Raises `BackendError`."""
        # A directory that the worker's user may not enter matters only to an option with a relative path.
        with suppress(OSError):
            os.chdir(self.cwd or "/")
        backend = load(self.kind, self.options)
        assert isinstance(backend, ConnectsInside)
        return backend


def open_for_workers(kind: str, options: Given, hint: Hint, kept: int | None = None) -> OpenStore:
    """Open the store of this kind; `kept` as above.  Raises `BackendError`, `OSError`."""
    backend = load(kind, options)
    # Each of these checks looks at every attribute of the protocol.
    if not isinstance(backend, RunsInside):
        if isinstance(backend, ConnectsInside):
            properties = check_properties(backend.look(hint))
            return OpenStore(attach_message(properties, hint.device, kind), None, ())
        raise BackendError(f"{kind}: cannot run inside a device's workers: use isolation process")
    inside = backend.open_inside(hint, kept)
    properties = check_properties(inside.properties)
    attach = attach_message(properties, hint.device, kind)
    if properties.segment is not None:
        attach = msgspec.structs.replace(attach, segment_bytes=properties.segment.size_bytes)
    return OpenStore(attach, inside.storage, inside.descriptors)


def grow_store(kind: str, options: Given, growth: Growth) -> None:
    """Grow a store that workers serve.  Raises `BackendError`, `OSError`."""
    backend = load(kind, options)
    if not isinstance(backend, GrowsInside):
        raise BackendError(f"{kind}: cannot grow inside a device's workers: use isolation process")
    backend.grow_inside(growth)


def refuse_another(growth: Growth, found: Identity, where: str) -> None:
    """Raise `BackendError` if what lies at `where` is not the store that the workers serve."""
    if not is_same_store(growth.bound, found, is_same_boot=True):
        raise BackendError(
            f"{where}: {found.store or 'another store'} lies there, and the device is served from "
            f"{growth.bound.store or 'another'}: bring that back, or grow it yourself"
        )


def settle_store(kind: str, options: Given) -> None:
    """The workers are gone for good: make durable what they wrote.  Raises `BackendError`, `OSError`."""
    backend = load(kind, options)
    if isinstance(backend, Settles):
        backend.settle()
