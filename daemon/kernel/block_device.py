"""The kernel's side of one device: create, start, stop and delete it, and its node.

Owns the order of control commands and what is read back after them.  Must not know backends or workers' insides.
Runs on the supervisor's asyncio loop; every command runs in a disposable process.
"""

import asyncio
import errno
import logging
import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ublkpool.bufpool import wire
from ublkpool.bufpool.way_out import explain
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.kernel import disk_node, disk_use
from ublkpool.daemon.kernel.client_area import ClientArea
from ublkpool.daemon.kernel.control_process import LOOK_DEADLINE_S, ControlFailed, ControlRunner
from ublkpool.daemon.kernel.disk_use import Users
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.ublk import abi, control
from ublkpool.ublk.abi import Attribute, DeviceInfo, Feature, Parameters
from ublkpool.ublk.errors import UblkError, UnsupportedError

NODE_DEADLINE_S = 30.0
OPEN_DEADLINE_S = 600.0
DELETE_PATIENCE_S = 5.0
IO_TIMEOUT_DEADLINE_S = 600.0
DRAIN_DEADLINE_S = 86400.0
MARK_BITS = 63
_POLL_S = 0.02
T = TypeVar("T")
_RECOVERY_FLAGS = {
    "none": Feature(0),
    "abort": Feature.USER_RECOVERY,
    "reissue": Feature.USER_RECOVERY | Feature.USER_RECOVERY_REISSUE,
    "fail": Feature.USER_RECOVERY | Feature.USER_RECOVERY_FAIL_IO,
}
_log = logging.getLogger("ublkpool.device")


class Created(NamedTuple):
    """What ADD_DEV really gave, the CPUs that each queue serves, and what the driver offers."""

    info: DeviceInfo
    queue_cpus: list[list[int]]
    features: Feature


def parameters(config: DeviceConfig, size_bytes: int, attach: wire.Attach) -> Parameters:
    """The disk that this config and this backend make."""
    attributes = Attribute(0)
    if config.read_only or attach.read_only:
        attributes |= Attribute.READ_ONLY
    if attach.rotational:
        attributes |= Attribute.ROTATIONAL
    if attach.volatile_cache:
        # FUA is the backend's duty wherever it caches; without the attribute the kernel would flush instead.
        attributes |= Attribute.VOLATILE_CACHE | Attribute.FUA
    return Parameters(
        size_bytes=size_bytes,
        max_io_bytes=config.max_io_bytes,
        logical_block_bytes=attach.logical_block_bytes,
        physical_block_bytes=attach.physical_block_bytes,
        attributes=attributes,
        discard_granularity_bytes=attach.discard_granularity_bytes,
        discard_max_bytes=attach.discard_max_bytes,
        write_zeroes_max_bytes=attach.write_zeroes_max_bytes,
    )


def wanted_flags(config: DeviceConfig, offered: int) -> Feature:
    """The flags to ask for.  Raises `UnsupportedError` naming the setting that this kernel does not offer."""
    flags = Feature.CMD_IOCTL_ENCODE | _RECOVERY_FLAGS[config.recovery]
    if config.need_get_data:
        flags |= Feature.NEED_GET_DATA
    if config.recovery != "none":
        # Not asked for by anybody: an upgrade does without it where it is not offered.
        flags |= Feature.QUIESCE & Feature(offered)
    if config.client_buffers_bytes:
        # Without it clients' requests are copied, as everybody's.
        flags |= Feature.SHMEM_ZC & Feature(offered)
    if not config.partitions:
        flags |= Feature.NO_AUTO_PART_SCAN
    missing = abi.feature_names(flags & ~offered)
    if missing:
        raise UnsupportedError(
            f"{config.name}: this kernel's ublk driver does not offer {', '.join(missing)}: "
            f"choose another recovery, need_get_data or partitions, or a newer kernel (see ublkpool features)"
        )
    return flags


def new_mark() -> int:
    """For one ADD_DEV; on record before that, so that what it made is found whatever happens."""
    return secrets.randbits(MARK_BITS)


def _create(config: DeviceConfig, disk: Parameters, server_pid: int, mark: int) -> Created:
    """Runs in the disposable process."""
    offered = control.get_features()
    flags = wanted_flags(config, offered)
    asked = DeviceInfo(
        queues=config.queues,
        depth=config.depth,
        max_io_bytes=config.max_io_bytes,
        device_number=abi.DEVICE_ANY if config.id is None else config.id,
        server_pid=server_pid,
        flags=flags,
        server_flags=mark,
    )
    info = control.add_device(asked)
    try:
        _check_granted(config, info, flags)
        control.set_parameters(info.device_number, disk._replace(max_io_bytes=info.max_io_bytes))
        cpus = [control.queue_cpus(info.device_number, queue) for queue in range(info.queues)]
    except BaseException:
        control.delete_device(info.device_number)
        raise
    return Created(info, cpus, Feature(offered))


def _find(number: int) -> Created:
    """Runs in the disposable process."""
    info = control.device_info(number)
    cpus = [control.queue_cpus(number, queue) for queue in range(info.queues)]
    return Created(info, cpus, Feature(control.get_features()))


def _find_marked(mark: int) -> int:
    """Runs in the disposable process; -1 if there is none."""
    for path in Path("/dev").glob("ublkc*"):
        number = path.name.removeprefix("ublkc")
        # A number that another program frees just now is not ours.
        with suppress(UblkError):
            if number.isdecimal() and control.device_info(int(number)).server_flags == mark:
                return int(number)
    return -1


def _check_granted(config: DeviceConfig, info: DeviceInfo, flags: Feature) -> None:
    refused = abi.feature_names(flags & ~info.flags)
    if refused:
        raise UnsupportedError(f"{config.name}: the driver took away {', '.join(refused)}")
    if info.depth != config.depth or info.max_io_bytes > config.max_io_bytes:
        raise UnsupportedError(
            f"{config.name}: asked for depth {config.depth} and {config.max_io_bytes} bytes a request, "
            f"the driver gives {info.depth} and {info.max_io_bytes}"
        )


def _write(setting: Path, value: str) -> None:
    """Runs in the disposable process."""
    setting.write_text(value)


def _set(setting: Path, value: str) -> None:
    """Runs in the disposable process.  The kernel waits for every request before it sets even the same value."""
    with suppress(OSError):
        if setting.read_text().strip() == value:
            return
    setting.write_text(value)


def _delete(number: int, mark: int) -> bool:
    """Runs in the disposable process; whether the kernel has rid itself of the device already."""
    control.expect_mark(number, mark)
    control.delete_device_later(number)
    deadline_s = time.monotonic() + DELETE_PATIENCE_S
    while time.monotonic() < deadline_s:
        try:
            control.expect_mark(number, mark)
        except UblkError as error:
            if error.errno == errno.ENODEV:
                return True
            raise
        time.sleep(_POLL_S)
    return False


class BlockDevice:
    """One ublk device in the kernel."""

    def __init__(self, runner: ControlRunner, name: str, created: Created) -> None:
        self._runner = runner
        self._name = name
        self.info = created.info
        self.queue_cpus = created.queue_cpus
        self.number = created.info.device_number
        self.node = Path(f"/dev/ublkb{self.number}")
        self._features = created.features
        self.is_started = created.info.state != abi.DeviceState.DEAD
        """Whether the kernel has a disk for it, so that its workers can be recovered."""

    @property
    def mark(self) -> int:
        """What tells this device from a later one with the same number; see `control.expect_mark`."""
        return self.info.server_flags

    def _ours(self, command: Callable[[], T]) -> Callable[[], T]:
        """The command, but not to a stranger's device: then ENODEV, as if the number were free."""
        number, mark = self.number, self.mark

        def marked() -> T:
            control.expect_mark(number, mark)
            return command()

        return marked

    @classmethod
    async def create(
        cls, runner: ControlRunner, config: DeviceConfig, disk: Parameters, mark: int | None = None
    ) -> "BlockDevice":
        """ADD_DEV and SET_PARAMS; queues may be fewer than asked for.

        Raises `DaemonError`; then, or if it is cancelled, the kernel may have the device: `find_marked` tells.
        """
        pid = os.getpid()
        mark = new_mark() if mark is None else mark
        try:
            created = await runner.run(
                f"{config.name}: ADD_DEV", lambda: _create(config, disk, pid, mark), Created
            )
        except ControlFailed as error:
            if error.errno == errno.EEXIST and config.id is not None:
                raise DaemonError(
                    f"{config.name}: device number {config.id} is taken: choose another id, or none"
                ) from error
            raise
        device = cls(runner, config.name, created)
        if created.info.queues < config.queues:
            _log.warning(
                "%s: %d queues asked for, the kernel gives %d (its CPUs)",
                config.name,
                config.queues,
                created.info.queues,
            )
        return device

    @classmethod
    async def find(cls, runner: ControlRunner, name: str, number: int, mark: int) -> "BlockDevice | None":
        """The device with this number, if the kernel has it and with this mark.  Raises `ControlFailed`."""
        try:
            created = await runner.run(f"{name}: GET_DEV_INFO", lambda: _find(number), Created)
        except ControlFailed as error:
            if error.errno == errno.ENODEV:
                return None
            raise
        if created.info.server_flags != mark:
            _log.warning("%s: device %d is another server's now, and left alone", name, number)
            return None
        return cls(runner, name, created)

    @classmethod
    async def find_marked(cls, runner: ControlRunner, name: str, mark: int) -> "BlockDevice | None":
        """The device that was added with this mark, if the kernel has it.  Raises `ControlFailed`."""
        number = await runner.run(f"{name}: GET_DEV_INFO", lambda: _find_marked(mark), int)
        return None if number < 0 else await cls.find(runner, name, number, mark)

    async def open_char(self) -> int:
        """Open /dev/ublkcN, which udev may still be making or looking at.  Raises `DaemonError`.

        On the loop, because the driver wants the process that opened it to be the one that started it: the driver's
        open waits for nothing (ublk_ch_open tests a bit), and /dev is kept in memory.
        """
        path = f"/dev/ublkc{self.number}"
        deadline_s = asyncio.get_running_loop().time() + NODE_DEADLINE_S
        while True:
            try:
                return os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except OSError as error:
                is_late = asyncio.get_running_loop().time() > deadline_s
                if is_late or error.errno in (errno.EMFILE, errno.ENFILE):
                    raise DaemonError(f"{self._name}: {path}: {explain(error)}") from error
            await asyncio.sleep(_POLL_S)

    async def register(self, area: ClientArea) -> bool:
        """Have the driver know every slice by its number, before START_DEV; whether it does."""
        if not self.info.flags & Feature.SHMEM_ZC:
            return False
        number = self.number
        with area.mapped() as memory:
            numbers = await self._runner.run(
                f"{self._name}: REG_BUF",
                self._ours(
                    lambda: [control.register_buffer(number, each, area.slice_bytes) for each in memory]
                ),
                list[int],
            )
        return numbers == list(range(len(numbers)))

    async def pass_requests(self) -> None:
        """Return when every request that the disk has now is answered, however long that takes.

        A change of the queue's limits waits for that (queue_limits_commit_update_frozen), and in no control command:
        a recovery goes on meanwhile.  New requests wait as well.  Raises `ControlFailed`.
        """
        setting = self._setting("rotational")
        await self._runner.run_beside(
            f"{self._name}: drain", lambda: _write(setting, setting.read_text()), type(None), DRAIN_DEADLINE_S
        )

    async def start(self, deadline_s: float, check: Callable[[], None]) -> None:
        """START_DEV, if `check` has nothing against it: the disk is there, before 7.x with its partitions scanned.

        An old driver takes a tag whose worker has died meanwhile for fetched, and crashes at the first request.
        """
        number, pid = self.number, os.getpid()

        def command() -> None:
            check()
            return control.start_device(number, pid)

        what = f"{self._name}: START_DEV"
        await self._runner.run_beside(what, self._ours(command), type(None), deadline_s)
        self.is_started = True

    async def wait_for_node(self) -> None:
        """Return when /dev/ublkbN is a block device that opens, and udev has settled.  Raises `DaemonError`.

        Linux 7.3 scans partitions after START_DEV and holds the disk's `open_mutex` meanwhile
        (ublk_partition_scan_work): an open waits there for as long as the backend takes to serve the scan.
        """
        node = str(self.node)
        if not await self._look(
            f"opening {node}", lambda: disk_node.wait_until_open(node, NODE_DEADLINE_S), bool, OPEN_DEADLINE_S
        ):
            raise DaemonError(f"{self._name}: {node} did not become a block device that can be opened")

    async def is_claimed(self, deadline_s: float = LOOK_DEADLINE_S) -> bool:
        """Whether the disk or a partition has an exclusive user.  Raises `CallHung`, `ControlFailed`."""
        node = str(self.node)
        return await self._look(f"opening {node}", lambda: disk_use.is_claimed(node), bool, deadline_s)

    async def users(self, deadline_s: float = LOOK_DEADLINE_S) -> Users:
        """Who uses the disk, as far as /proc and /sys show it.  Raises `CallHung`, `ControlFailed`."""
        name = self.node.name
        return await self._look(
            f"looking for users of {name}", lambda: disk_use.find_users(name), Users, deadline_s
        )

    async def mappers(self) -> Users:
        """The processes that have the disk mapped.  Raises `CallHung`, `ControlFailed`."""
        name = self.node.name
        return await self._look(f"looking for users of {name}", lambda: disk_use.find_mappers(name), Users)

    async def _look(
        self, what: str, work: Callable[[], Any], result: type[T], deadline_s: float = LOOK_DEADLINE_S
    ) -> T:
        return await self._runner.look(self._name, f"{self._name}: {what}", work, result, deadline_s)

    async def set_io_timeout(self, timeout_ms: int) -> None:
        """How soon the driver looks whether a request's worker still lives; 30 s is the block layer's default.

        A worker that dies while it holds every tag is noticed by nothing else; on a living one the timer only restarts.
        """
        setting, wanted = self._io_timeout_file, str(timeout_ms)
        await self._runner.run_beside(
            f"{self._name}: io_timeout", lambda: _set(setting, wanted), type(None), IO_TIMEOUT_DEADLINE_S
        )

    @property
    def _io_timeout_file(self) -> Path:
        return self._setting("io_timeout")

    def _setting(self, name: str) -> Path:
        return Path(f"/sys/block/{self.node.name}/queue/{name}")

    async def quiesce(self, deadline_s: float) -> bool:
        """QUIESCE_DEV: new requests wait, and workers end once they have answered theirs; False where there is none.

        Raises `ControlFailed`, and then the device goes on, or waits for recovery.
        """
        if not self.info.flags & Feature.QUIESCE:
            return False
        number, timeout_ms = self.number, int(deadline_s * 1000)
        await self._runner.run_beside(
            f"{self._name}: QUIESCE_DEV",
            self._ours(lambda: control.quiesce_device(number, timeout_ms)),
            type(None),
            2 * deadline_s,
        )
        return True

    async def wait_quiesced(self, deadline_s: float) -> None:
        """Return when the driver has given up the dead workers' requests.  Raises `DaemonError`."""
        loop, number = asyncio.get_running_loop(), self.number
        until_s = loop.time() + deadline_s
        while True:
            info = await self._runner.run(
                f"{self._name}: GET_DEV_INFO", lambda: control.device_info(number), DeviceInfo
            )
            if info.server_flags != self.mark:
                raise DaemonError(f"device {number} is another server's now, ours is gone")
            if info.state in (abi.DeviceState.QUIESCED, abi.DeviceState.FAIL_IO):
                return
            if loop.time() > until_s:
                raise DaemonError(
                    f"the driver has not given up the dead workers' requests after {deadline_s:.0f} s "
                    f"(state {info.state}): who else holds /dev/ublkc{number}?"
                )
            await asyncio.sleep(_POLL_S)

    async def start_recovery(self, deadline_s: float) -> None:
        """START_USER_RECOVERY, tried again while the driver says that somebody holds the device.

        Workers may have died since an earlier one, of this daemon's or of one before it, with any tags fetched.  A
        driver that offers QUIESCE_DEV (Linux 6.16) forgets them when the last holder closes; older ones must see every
        queue fetched first.
        """
        number, info = self.number, self.info
        if not self._features & Feature.QUIESCE:
            await self._retry_busy(
                f"{self._name}: FETCH_REQ",
                self._ours(lambda: control.complete_fetch_round(number, info.queues, info.depth)),
                deadline_s,
            )
        await self._retry_busy(
            f"{self._name}: START_USER_RECOVERY",
            self._ours(lambda: control.start_recovery(number)),
            deadline_s,
        )

    @property
    def tears_siblings(self) -> bool:
        """Whether one worker's death in a recovery takes the other queues' tags, and the driver forgets that it did.

        Before Linux 6.15: made live afterwards, the device sends requests to commands that are no more: a panic.
        """
        return self.info.queues > 1 and not self._features & Feature.QUIESCE

    async def end_recovery(
        self, deadline_s: float, begun: asyncio.Event, check: Callable[[], None] = lambda: None
    ) -> None:
        """END_USER_RECOVERY, if `check` has nothing against it.

        It waits until every tag is fetched, then the requests of the dead come again.  `begun` is set when it waits in
        the kernel, or is about to.  Raises `ControlFailed`, also for what `check` says.
        """
        number, pid = self.number, os.getpid()

        def command() -> None:
            check()
            return control.end_recovery(number, pid)

        await self._retry_busy(f"{self._name}: END_USER_RECOVERY", self._ours(command), deadline_s, begun)

    async def _retry_busy(
        self,
        what: str,
        command: Callable[[], None],
        deadline_s: float,
        begun: asyncio.Event | None = None,
    ) -> None:
        until_s = asyncio.get_running_loop().time() + deadline_s
        while True:
            try:
                return await self._runner.run_beside(what, command, type(None), deadline_s, begun)
            except ControlFailed as error:
                busy = error.errno in (errno.EBUSY, errno.EINTR)
                if not busy or asyncio.get_running_loop().time() > until_s:
                    raise
            await asyncio.sleep(_POLL_S)

    @property
    def can_try_stop(self) -> bool:
        """Whether the driver has `try_stop` (Linux 7.0)."""
        return bool(self._features & Feature.SAFE_STOP_DEV)

    async def try_stop(self, deadline_s: float) -> bool:
        """TRY_STOP_DEV: STOP_DEV, unless the disk or a partition is open; whether it stopped.  Raises `ControlFailed`.

        The driver counts openers under the disk's `open_mutex`, and lets no process open it from there on
        (ublk_ctrl_try_stop_dev): there is no moment between the look and the stop.
        """
        number = self.number
        try:
            await self._runner.run_beside(
                f"{self._name}: TRY_STOP_DEV",
                self._ours(lambda: control.try_stop_device(number)),
                type(None),
                deadline_s,
            )
        except ControlFailed as error:
            if error.errno == errno.EBUSY:
                return False
            # Without a disk, which another program may have stopped, there is nothing to take away.
            if error.errno != errno.ENODEV:
                raise
        return True

    async def has_gone(self) -> bool:
        """Whether the kernel has begun to remove the disk.  Raises `CallHung`, `ControlFailed`."""
        name = self.node.name
        return await self._look(f"looking for {name}", lambda: disk_node.has_gone(name), bool)

    async def stop(self, deadline_s: float) -> None:
        """STOP_DEV: the disk goes, then every fetched tag is cancelled.  Raises `ControlFailed`."""
        number = self.number
        await self._runner.run_beside(
            f"{self._name}: STOP_DEV",
            self._ours(lambda: control.stop_device(number)),
            type(None),
            deadline_s,
        )

    async def delete(self) -> None:
        """DEL_DEV_ASYNC, when no worker holds /dev/ublkcN any more.  Raises `ControlFailed`.

        DEL_DEV would wait for whoever has the disk mounted or open, and everything else with it.
        """
        number, mark = self.number, self.mark
        if not await self._runner.run(f"{self._name}: DEL_DEV", lambda: _delete(number, mark), bool):
            _log.warning(
                "%s: somebody still has its disk mounted or open; number %d is free when they let go",
                self._name,
                number,
            )
