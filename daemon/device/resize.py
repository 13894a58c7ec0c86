"""A live device grows: its store, its record, its disk, in this order.

Owns that order.  The backend has the store grow and answers once it serves all of it; then the new size is written to
the state directory, which is the step that decides; then to the device's record; then the driver is told.  Whichever
process is killed, the store is at least as large as the size on record, and that at least as large as the disk.
`repair_soon` tells the driver what an earlier attempt or an earlier daemon did not.  The workers check no offsets.

Runs on the supervisor's asyncio loop; the store grows without the device's turn, so that recoveries do not wait for it.
"""

import asyncio
import logging
from typing import NamedTuple

from ublkpool.bufpool.sizes import format_size
from ublkpool.daemon.backends.session import Session
from ublkpool.daemon.device.disk import Disk
from ublkpool.daemon.device.inside import InsideStore
from ublkpool.daemon.device.parts import DeviceParts
from ublkpool.daemon.device.team import Team
from ublkpool.daemon.errors import ConfigError, DaemonError, one_line, without_name
from ublkpool.daemon.events.kinds import DeviceResized
from ublkpool.daemon.kernel.block_device import BlockDevice
from ublkpool.daemon.processes.background import logged
from ublkpool.daemon.settings.config import DEVICE_BYTES_MAX
from ublkpool.daemon.status import ResizeResult

STORE_DEADLINE_S = 60.0
UPDATE_DEADLINE_S = 30.0
ANNOUNCE_PAUSE_S = 1.0
_log = logging.getLogger("ublkpool.device")


async def resize(parts: DeviceParts, size_bytes: int, is_relative: bool) -> ResizeResult:
    """Give the device this size, or with `is_relative` that many bytes more.

    Raises `ConfigError` for a size that it cannot have, `DaemonError` if a part of it cannot grow; then it goes on with
    the old size, or the message says what the new one waits for.
    """
    async with parts.growing:
        disk, _ = _live(parts)
        wanted_bytes = disk.size_bytes + size_bytes if is_relative else size_bytes
        _check_size(parts.config.name, disk, wanted_bytes)
        if wanted_bytes > disk.size_bytes:
            _check_driver(parts)
            serving = _serving(parts)
            await _grow_store(parts, serving, wanted_bytes)
            return await _grow_device(parts, wanted_bytes, serving)
        return await _finish_earlier(parts, wanted_bytes)


async def _finish_earlier(parts: DeviceParts, wanted_bytes: int) -> ResizeResult:
    """The device has this size on record; the driver may not know it yet."""
    # A deletion holds the turn, and its STOP_DEV must not come between the two commands of `kernel.update_size`.
    async with parts.life.turn:
        _, kernel = _live(parts)
        before_bytes = kernel.size_bytes
        if before_bytes < wanted_bytes:
            _check_driver(parts)
            await _update(parts)
            _tell(parts, before_bytes, wanted_bytes)
    return ResizeResult(before_bytes=min(before_bytes, wanted_bytes), after_bytes=wanted_bytes)


def _live(parts: DeviceParts) -> tuple[Disk, BlockDevice]:
    """The disk and the kernel's device.  Raises `DaemonError` unless the device is live."""
    life, resources = parts.life, parts.resources
    if life.state != "live" or life.is_stopping or resources.disk is None or resources.kernel is None:
        state = "being deleted" if life.is_stopping else life.state
        raise DaemonError(
            f"{parts.config.name}: the device is {state}: only a live one is resized; try again when it is live"
        )
    return resources.disk, resources.kernel


def _check_size(name: str, disk: Disk, wanted_bytes: int) -> None:
    """Raise `ConfigError` for a size that this disk cannot have."""
    present = f"{format_size(disk.size_bytes)} ({disk.size_bytes} bytes)"
    if wanted_bytes < disk.size_bytes:
        raise ConfigError(
            [f"{name}: has {present}, and a device never shrinks: add a smaller one and copy the data"]
        )
    if wanted_bytes > DEVICE_BYTES_MAX:
        raise ConfigError(
            [f"{name}: {wanted_bytes} bytes are more than a device can have: {DEVICE_BYTES_MAX}"]
        )
    if wanted_bytes % disk.block_bytes:
        raise ConfigError(
            [
                f"{name}: {wanted_bytes} bytes are no multiple of the device's block of {disk.block_bytes} bytes"
            ]
        )


def _check_driver(parts: DeviceParts) -> None:
    _, kernel = _live(parts)
    name = parts.config.name
    if not kernel.can_update_size:
        raise DaemonError(
            f"{name}: this kernel's ublk driver has no UPDATE_SIZE (Linux 6.16 has): unmount the disk, delete the "
            f"device (ublkpool del {name}), grow its store and add it again with the new size"
        )


class _Serving(NamedTuple):
    """Who serves the device: a backend, or workers that run its engine themselves."""

    session: Session | None
    team: Team | None


def _serving(parts: DeviceParts) -> _Serving:
    return _Serving(parts.backend.session, parts.resources.team if parts.inside is not None else None)


async def _grow_store(parts: DeviceParts, serving: _Serving, wanted_bytes: int) -> None:
    """Have the backend, or the workers, serve this size.  Raises `DaemonError`."""
    if parts.config.answers == "worker":
        return
    name, session = parts.config.name, serving.session
    if serving.team is not None and parts.inside is not None:
        await _grow_inside(parts, parts.inside, serving.team, wanted_bytes)
        return
    if session is None or session.is_gone or session.is_leaving:
        raise DaemonError(f"{name}: no backend is attached whose store could grow: try again when one is")
    if not session.attach.resizes:
        raise DaemonError(
            f"{name}: its backend {session.attach.kind} cannot grow its store while it serves: unmount the disk, "
            f"delete the device (ublkpool del {name}), grow the store and add the device again with the new size"
        )
    try:
        await session.resize(wanted_bytes, STORE_DEADLINE_S)
    except DaemonError as error:
        raise DaemonError(f"{name}: keeps its size: {error}") from error


async def _grow_inside(parts: DeviceParts, store: InsideStore, team: Team, wanted_bytes: int) -> None:
    """Have the store grow, then the workers' engines serve all of it.  Raises `DaemonError`."""
    name, bound, (disk, _) = parts.config.name, parts.binding.store, _live(parts)
    if bound is None or not (team.can_grow if store.connects else team.can_resize):
        raise DaemonError(
            f"{name}: keeps its size: its workers run an earlier version: try again when they have been replaced"
        )
    try:
        if store.connects:
            # Only the worker's client has the store's lock.
            await team.grow(wanted_bytes, STORE_DEADLINE_S)
            return
        await store.grow(bound.identity, disk.size_bytes, wanted_bytes)
        await team.resize(wanted_bytes)
    except DaemonError as error:
        raise DaemonError(f"{name}: keeps its size: {without_name(name, one_line(error))}") from error


async def _grow_device(parts: DeviceParts, wanted_bytes: int, serving: _Serving) -> ResizeResult:
    """The store of these who serve has this size: put that on record and tell the driver.  Raises `DaemonError`."""
    async with parts.life.turn:
        # The device may have failed while the store grew.
        disk, _ = _live(parts)
        _check_serves(parts, serving)
        await parts.binding.resize(wanted_bytes)
        parts.resources.grow(wanted_bytes)
        await _update(parts)
    _tell(parts, disk.size_bytes, wanted_bytes)
    return ResizeResult(before_bytes=disk.size_bytes, after_bytes=wanted_bytes)


def _check_serves(parts: DeviceParts, serving: _Serving) -> None:
    """Raise `DaemonError` unless these serve the device: their successors have begun with the old size."""
    now, session = _serving(parts), serving.session
    if (
        now.session is not session
        or now.team is not serving.team
        or (session is not None and session.is_gone)
    ):
        who = "backend whose store grew is" if serving.team is None else "workers whose store grew are"
        raise DaemonError(f"{parts.config.name}: keeps its size: the {who} gone: try again")


def _tell(parts: DeviceParts, before_bytes: int, after_bytes: int) -> None:
    details = DeviceResized(before_bytes=before_bytes, after_bytes=after_bytes)
    parts.events.tell(_log, details, f"grew from {before_bytes} to {after_bytes} bytes")


async def _update(parts: DeviceParts) -> None:
    """Have the driver know the size on record.  Raises `DaemonError` that says what the new size waits for."""
    disk, kernel = _live(parts)
    name, size = parts.config.name, disk.size_bytes
    try:
        parts.save()
        await kernel.update_size(size, UPDATE_DEADLINE_S)
    except (DaemonError, OSError) as error:
        reason = without_name(name, one_line(error))
        raise DaemonError(
            f"{name}: {size} bytes are on record, and the disk has not been told: {reason}: "
            f"try again with: ublkpool resize {name} {size}"
        ) from error


def repair_soon(parts: DeviceParts) -> None:
    """Tell the driver the size on record, if an earlier attempt or an earlier daemon has not."""
    disk, kernel = parts.resources.disk, parts.resources.kernel
    if disk is not None and kernel is not None and kernel.size_bytes < disk.size_bytes:
        parts.background.spawn(_repair(parts))


async def _repair(parts: DeviceParts) -> None:
    with logged(parts.config.name):
        await parts.life.live()
        async with parts.growing, parts.life.turn:
            disk, kernel = _live(parts)
            if kernel.size_bytes < disk.size_bytes:
                before_bytes = kernel.size_bytes
                _check_driver(parts)
                await _update(parts)
                _tell(parts, before_bytes, disk.size_bytes)


def follow_growth(parts: DeviceParts) -> None:
    """Have the device follow its store, which may grow by itself; called once for each backend, or team of workers."""
    serving = _serving(parts)
    hear = Announcements(parts, serving).hear
    if serving.session is not None:
        session = serving.session
        session.on_grown = hear
        if session.grown_bytes:
            # An adopted session has read since its takeover began, and a backend announces a size only once.
            hear(session.grown_bytes)
    elif serving.team is not None and parts.inside is not None and parts.inside.connects:
        serving.team.follow_growth(hear)


class Announcements:
    """The sizes to which a store grows by itself: the device follows, to the last one announced."""

    def __init__(self, parts: DeviceParts, serving: _Serving) -> None:
        """`serving`: those whose store it is."""
        self._parts, self._serving = parts, serving
        self._announced_bytes = 0
        self._following: asyncio.Task[None] | None = None

    def hear(self, size_bytes: int) -> None:
        """The store has this size."""
        self._announced_bytes = size_bytes
        if self._following is None or self._following.done():
            self._following = self._parts.background.spawn(self._follow())

    async def _follow(self) -> None:
        followed_bytes = 0
        while followed_bytes != self._announced_bytes:
            followed_bytes = self._announced_bytes
            with logged(self._parts.config.name):
                await self._grow(followed_bytes)
            # A store that grows all the time must not keep the state directory busy.
            await asyncio.sleep(ANNOUNCE_PAUSE_S)

    async def _grow(self, size_bytes: int) -> None:
        parts = self._parts
        await parts.life.live()
        async with parts.growing:
            disk, _ = _live(parts)
            wanted_bytes = size_bytes // disk.block_bytes * disk.block_bytes
            if wanted_bytes > disk.size_bytes:
                _check_size(parts.config.name, disk, wanted_bytes)
                _check_driver(parts)
                await _grow_device(parts, wanted_bytes, self._serving)
