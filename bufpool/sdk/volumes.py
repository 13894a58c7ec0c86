"""The volumes of a kind of backend: making, listing and deleting the stores that its devices are served from.

A kind offers them by naming a subclass of `Volumes` in `Backend.volumes`.  It runs in the process of `ublkpool volume`,
without a daemon.  A volume in use is refused, by what its store itself shows (a lock, a watcher): another daemon or
another host may use it.
"""

from collections.abc import Callable
from typing import ClassVar

import msgspec

from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk.backend import NoOptions

Progress = Callable[[int, int], None]
"""Called with how much is done, and of how much."""


class VolumeError(BackendError):
    """What was asked for cannot be done; the text is one line that names the volume and the way out."""


class Volume(msgspec.Struct, frozen=True, kw_only=True):
    """A volume as `ublkpool volume list` shows it; a field of `--json` is added, never changed."""

    name: str
    size_bytes: int
    used_bytes: int | None = None
    """What it takes in the store; None where that is not known at once."""
    parent: str = ""
    """The snapshot that it is a clone of."""
    snapshots: tuple[str, ...] = ()
    users: tuple[str, ...] = ()
    """Who has it open, as far as the store shows."""


class VolumeInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What `ublkpool volume info` shows of a volume that shares content with a parent."""

    name: str
    size_bytes: int
    used_bytes: int | None = None
    """What it takes in the store."""
    parent: str
    own_bytes: int
    """How much of the disk lies in the volume itself."""
    zero_bytes: int
    """How much of the disk is zeros that take no room."""
    users: tuple[str, ...] = ()
    trouble: str = ""
    """Why it cannot be served as it is."""


class Volumes:
    """The volumes of one kind; override what the kind can do.  Each method raises `VolumeError` or `OSError`."""

    kind: ClassVar[str]
    Options: ClassVar[type[msgspec.Struct]] = NoOptions
    """What leads to a volume, as KEY=VALUE; `list` is given the same without the volume itself."""

    def __init__(self, options: msgspec.Struct) -> None:
        self.options = options

    def create(self, size_bytes: int) -> str:
        """Make the volume, which must not exist; returns what leads to it, as KEY=VALUE."""
        raise self._cannot("make volumes")

    def list(self) -> list[Volume]:
        """The volumes that there are, by name."""
        raise self._cannot("list volumes")

    def resize(self, size_bytes: int) -> int:
        """Make the volume larger while no device uses it; returns the size that it had."""
        raise self._cannot("resize volumes")

    def snapshot(self, name: str) -> str:
        """Keep the volume's content of now under this name; returns what leads to it, as KEY=VALUE."""
        raise self._cannot("make snapshots")

    def clone(self, target: str, progress: Progress) -> str:
        """Make the volume `target` with this one's content; returns what leads to it, as KEY=VALUE."""
        raise self._cannot("clone volumes")

    def delete(self) -> None:
        """Delete the volume, or the snapshot that the options name, while no device uses it."""
        raise self._cannot("delete volumes")

    def reset(self) -> str:
        """Throw away what the volume holds beyond its parent; returns what leads to it, as KEY=VALUE."""
        raise self._cannot("reset volumes")

    def commit(self, target: str, progress: Progress) -> str:
        """Write volume and parent together into the new parent `target`; returns what leads to that, as KEY=VALUE."""
        raise self._cannot("commit volumes")

    def info(self) -> VolumeInfo:
        """How much of the disk lies in the volume itself, and what keeps it from being served."""
        raise self._cannot("tell what lies in a volume")

    def _cannot(self, what: str) -> VolumeError:
        return VolumeError(f"{self.kind}: cannot {what}")


def whole_blocks(size_bytes: int) -> int:
    """The size, which must be at least one block of 512 bytes and whole blocks.  Raises `VolumeError`."""
    if size_bytes <= 0 or size_bytes % 512:
        raise VolumeError(f"--size {size_bytes}: must be a multiple of 512 bytes, and not 0")
    return size_bytes
