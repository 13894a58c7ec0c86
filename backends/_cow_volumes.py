"""Overlays as volumes: made, listed, grown, thrown away, and committed into a new base, while no device uses them."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from ublkpool.backends._cow_format import Head, read_head
from ublkpool.backends._cow_overlay import (
    NewOverlay,
    Overlay,
    compare_base,
    grown,
    make_overlay,
    open_map,
    refuse_short,
    reset,
)
from ublkpool.backends._file_volumes import (
    FileVolumeOptions,
    FileVolumes,
    alone,
    copy_part,
    described,
    new_file,
    next_data,
)
from ublkpool.bufpool.engine.cow import BASE, DATA, ZERO, Run
from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk.volumes import Progress, Volume, VolumeError, VolumeInfo, Volumes, whole_blocks
from ublkpool.bufpool.sizes import format_size
from ublkpool.bufpool.way_out import explain

_STEP_BYTES = 16 << 20


class CowVolumeOptions(msgspec.Struct, frozen=True):
    """The overlay, for `list` the directory; `base` for `create`, or another base for `reset`."""

    overlay: Path
    base: Path | None = None


class CowVolumes(Volumes):
    """Overlays, see docs/COW.md."""

    kind = "cow"
    Options = CowVolumeOptions

    def __init__(self, options: CowVolumeOptions) -> None:
        self.path = options.overlay
        self.base = options.base

    def create(self, size_bytes: int) -> str:
        """See `Volumes`: an empty overlay on `base`."""
        if self.base is None:
            raise VolumeError(f"overlay={self.path}: give base=FILE, which it is made on")
        make_overlay(NewOverlay(self.path, self.base, whole_blocks(size_bytes)))
        return f"overlay={self.path}"

    def list(self) -> list[Volume]:
        """See `Volumes`: the overlays of the directory, each with its base as parent."""
        if not self.path.is_dir():
            raise VolumeError(f"overlay={self.path}: no directory: list shows the overlays of one")
        found = []
        for each in sorted(self.path.iterdir()):
            # A file may be deleted meanwhile, and may be another's.
            with suppress(OSError, BackendError):
                if stat.S_ISREG(each.stat().st_mode) and not each.name.startswith("."):
                    found.append(_overlay_as_volume(each))
        return found

    def resize(self, size_bytes: int) -> int:
        """See `Volumes`: the new bytes read as zeros."""
        with self._locked(os.O_RDWR) as (file, head):
            before_bytes = head.layout.size_bytes
            if whole_blocks(size_bytes) < before_bytes:
                raise VolumeError(
                    f"overlay={self.path}: its disk has {format_size(before_bytes)} ({before_bytes} bytes), and a "
                    "volume never shrinks: its end would be lost"
                )
            grown(file, self.path, head, size_bytes)
        return before_bytes

    def delete(self) -> None:
        """See `Volumes`; the base stays."""
        with self._locked(os.O_RDONLY):
            pass
        FileVolumes(FileVolumeOptions(self.path)).delete()

    def reset(self) -> str:
        """See `Volumes`: the disk reads as its base again; `base` gives it another."""
        with self._locked(os.O_RDWR) as (file, head):
            reset(file, self.path, self.base)
        return f"overlay={self.path} base={self.base or head.base}"

    def commit(self, target: str, progress: Progress) -> str:
        """See `Volumes`: the overlay and its base stay as they are."""
        with self._locked(os.O_RDONLY) as (file, _):
            overlay = Overlay(file, self.path, self.base, serves=False)
            try:
                with new_file(Path(target)) as made:
                    _write_content(overlay, made, progress)
            finally:
                overlay.close()
        return f"base={target}"

    def info(self) -> VolumeInfo:
        """See `Volumes`; of an overlay that is served, as of now."""
        file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            head = read_head(file, self.path)
            found = open_map(file, self.path, head)
            try:
                own_bytes, zero_bytes = found.count_bytes(DATA), found.count_bytes(ZERO)
            finally:
                found.close()
            trouble = self._trouble(file, head)
        finally:
            os.close(file)
        listed = described(self.path, self.path.stat())
        return VolumeInfo(
            name=str(self.path),
            size_bytes=head.layout.size_bytes,
            used_bytes=listed.used_bytes,
            parent=str(head.base),
            own_bytes=own_bytes,
            zero_bytes=zero_bytes,
            users=listed.users,
            trouble=trouble,
        )

    def _trouble(self, file: int, head: Head) -> str:
        base = self.base or head.base
        try:
            refuse_short(file, self.path, head)
            compare_base(base.stat(), base, head)
        except BackendError as error:
            return str(error)
        except OSError as error:
            return f"base={base}: {explain(error)}"
        return ""

    @contextmanager
    def _locked(self, flags: int) -> Iterator[tuple[int, Head]]:
        with alone(self.path, flags, "overlay") as file:
            yield file, read_head(file, self.path)


def _overlay_as_volume(path: Path) -> Volume:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        head = read_head(file, path)
    finally:
        os.close(file)
    listed = described(path, path.stat())
    return msgspec.structs.replace(listed, size_bytes=head.layout.size_bytes, parent=str(head.base))


def _write_content(overlay: Overlay, target: int, progress: Progress) -> None:
    """The disk's content as a plain file, with holes where it reads as zeros."""
    size_bytes = overlay.head.layout.size_bytes
    os.ftruncate(target, size_bytes)
    for run in overlay.map.runs():
        if run.state == DATA:
            data_at = overlay.head.layout.data_at + run.offset
            _copy_range(overlay.file, target, data_at, run)
        elif run.state == BASE:
            _copy_base(overlay, target, run)
        progress(run.offset + run.length, size_bytes)


def _copy_base(overlay: Overlay, target: int, run: Run) -> None:
    at, end = run.offset, min(run.offset + run.length, overlay.head.layout.base_bytes)
    while at < end and (data := next_data(overlay.base, at)) is not None:
        first, last = data[0], min(data[1], end)
        if first < last:
            _copy_range(overlay.base, target, first, Run(first, last - first, BASE))
        at = data[1]


def _copy_range(source: int, target: int, source_at: int, run: Run) -> None:
    done = 0
    while done < run.length:
        step = min(_STEP_BYTES, run.length - done)
        copied = copy_part(source, target, source_at + done, run.offset + done, step)
        if copied == 0:
            raise VolumeError("a file that is committed became shorter meanwhile: nothing was made")
        done += copied
