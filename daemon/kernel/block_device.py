"""One ublk device in the kernel: create, start, quiesce, recover, stop and delete it.

Owns the order of control commands and what is read back after them.  Must not know backends or workers' insides.
Runs on the supervisor's asyncio loop; every command runs in a disposable process.
"""

import asyncio
import errno
import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from ublkpool.bufpool.way_out import explain
from ublkpool.daemon.errors import DaemonError, without_name
from ublkpool.daemon.kernel import device_commands
from ublkpool.daemon.kernel.client_area import ClientArea
from ublkpool.daemon.kernel.control_process import ControlFailed, ControlRunner
from ublkpool.daemon.kernel.device_commands import Created
from ublkpool.daemon.kernel.disk_names import DiskNames
from ublkpool.daemon.kernel.disk_view import NODE_DEADLINE_S, DiskView
from ublkpool.daemon.kernel.opener import Opener
from ublkpool.daemon.plain_call import Call
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.ublk import abi, control
from ublkpool.ublk.abi import DeviceInfo, Feature, Parameters

_POLL_S = 0.02
T = TypeVar("T")
_log = logging.getLogger("ublkpool.device")


class BlockDevice(DiskView):
    """One ublk device in the kernel."""

    def __init__(self, runner: ControlRunner, name: str, created: Created) -> None:
        super().__init__(runner, name, created.info.device_number)
        self.info = created.info
        self.queue_cpus = created.queue_cpus
        self._features = created.features
        self.size_bytes = created.size_bytes
        """The disk's, as far as this daemon knows."""
        self.is_started = created.info.state != abi.DeviceState.DEAD
        """Whether the kernel has a disk for it, so that its workers can be recovered."""
        self._parameters_due: Parameters | None = None
        """Those of a prepared device, which `start` sends before START_DEV; None: the driver has them."""
        self.opener: Opener | None = None
        """The process that the driver takes for the server of a user's device, from `open_char` on."""

    @property
    def is_a_users(self) -> bool:
        """Whether an ordinary user added it, see `ublk/privilege.py`."""
        return bool(self.info.flags & Feature.UNPRIVILEGED_DEV)

    @property
    def mark(self) -> int:
        """The number that tells this device from a later one with the same device number; see `control.expect_mark`."""
        return self.info.server_flags

    def _ours(self, command: Callable[..., T], *arguments: Any) -> Call:
        """The command, refused with ENODEV if the device number is another server's by now."""
        return Call(device_commands.ours, self.number, self.mark, command, *arguments)

    def _ours_here(self, command: Callable[[], T]) -> Callable[[], T]:
        """The same of a command that needs what only this process, or one that is forked for it, has."""
        return partial(device_commands.ours, self.number, self.mark, command)

    @classmethod
    async def create(
        cls, runner: ControlRunner, config: DeviceConfig, disk: Parameters | None, mark: int
    ) -> "BlockDevice":
        """ADD_DEV and, if the disk is known, SET_PARAMS; queues may be fewer than asked for.

        Raises `DaemonError`; then, or if it is cancelled, the kernel may have the device: `find_marked` tells.
        """
        pid = os.getpid()
        try:
            created = await runner.run(
                f"{config.name}: ADD_DEV", Call(device_commands.create, config, disk, pid, mark), Created
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
        """The device with this number and this mark, if the kernel has it.  Raises `ControlFailed`."""
        try:
            created = await runner.run(f"{name}: GET_DEV_INFO", Call(device_commands.find, number), Created)
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
        number = await runner.run(f"{name}: GET_DEV_INFO", Call(device_commands.find_marked, mark), int)
        return None if number < 0 else await cls.find(runner, name, number, mark)

    async def open_char(self) -> int:
        """Open /dev/ublkcN, which udev may still be creating or reading.  Raises `DaemonError`.

        On the loop, since the driver wants the process that opened it to be the one that started it: the driver's open
        does not wait (ublk_ch_open tests a bit), and /dev is in memory.
        """
        path = control.node_path(self.number)
        if self.is_a_users:
            self.opener, fd = await Opener.start(path, NODE_DEADLINE_S)
            return fd
        deadline_s = asyncio.get_running_loop().time() + NODE_DEADLINE_S
        while True:
            try:
                return os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except OSError as error:
                is_late = asyncio.get_running_loop().time() > deadline_s
                if is_late or error.errno in (errno.EMFILE, errno.ENFILE):
                    raise DaemonError(f"{self._name}: {path}: {explain(error)}") from error
            await asyncio.sleep(_POLL_S)

    def take(self, name: str, disk: Parameters) -> None:
        """This device has taken what was prepared without a disk: START_DEV comes after SET_PARAMS for this one."""
        self._name, self.size_bytes = name, disk.size_bytes
        self._parameters_due = disk._replace(max_io_bytes=self.info.max_io_bytes)

    async def register(self, area: ClientArea) -> bool:
        """Register every slice with the driver under its number, before START_DEV; false if the driver cannot."""
        if not self.info.flags & Feature.SHMEM_ZC:
            return False
        number = self.number
        with area.mapped() as memory:
            numbers = await self._runner.run(
                f"{self._name}: REG_BUF",
                self._ours_here(
                    lambda: [control.register_buffer(number, each, area.slice_bytes) for each in memory]
                ),
                list[int],
            )
        return numbers == list(range(len(numbers)))

    async def start(self, deadline_s: float, check: Call) -> None:
        """START_DEV, unless `check` raises: the disk exists then, before 7.x with its partitions scanned.

        One call sends SET_PARAMS before that, if it is due.

        `check` runs right before the command.  An old driver counts a tag whose worker has died meanwhile as fetched,
        and crashes at the first request.
        """
        pid = self.opener.pid if self.opener is not None else os.getpid()
        (fd,) = check.fds
        plain = Call(check.function, *check.arguments)
        due = self._parameters_due
        command = Call(device_commands.start, self.number, self.mark, due, plain, pid, fds=[fd])
        await self._command_beside("START_DEV", command, deadline_s)
        self._parameters_due = None
        self.is_started = True

    @property
    def can_update_size(self) -> bool:
        """Whether the driver has UPDATE_SIZE (Linux 6.16), and a disk to change."""
        return self.is_started and bool(self._features & Feature.UPDATE_SIZE)

    async def update_size(self, size_bytes: int, deadline_s: float) -> None:
        """UPDATE_SIZE.  Raises `ControlFailed`; whether the disk has the new size is unknown then."""
        number = self.number
        await self._command_beside(
            "UPDATE_SIZE", self._ours(device_commands.grow, number, size_bytes), deadline_s
        )
        self.size_bytes = size_bytes

    async def quiesce(self, deadline_s: float) -> bool:
        """QUIESCE_DEV: new requests wait, and workers end once they have answered theirs; false without the feature.

        Raises `ControlFailed`; the device then goes on, or waits for recovery.
        """
        if not self.info.flags & Feature.QUIESCE:
            return False
        number, timeout_ms = self.number, int(deadline_s * 1000)
        await self._command_beside(
            "QUIESCE_DEV", self._ours(control.quiesce_device, number, timeout_ms), 2 * deadline_s
        )
        return True

    async def wait_quiesced(self, deadline_s: float) -> None:
        """Return when the driver has given up the dead workers' requests.  Raises `DaemonError`."""
        loop, number = asyncio.get_running_loop(), self.number
        until_s = loop.time() + deadline_s
        while True:
            info = await self._runner.run(
                f"{self._name}: GET_DEV_INFO", Call(control.device_info, number), DeviceInfo
            )
            if info.server_flags != self.mark:
                raise DaemonError(f"device {number} is another server's now, ours is gone")
            if info.state in (abi.DeviceState.QUIESCED, abi.DeviceState.FAIL_IO):
                return
            if loop.time() > until_s:
                raise DaemonError(
                    f"the driver has not given up the dead workers' requests after {deadline_s:.0f} s "
                    f"(state {info.state}): another process may have /dev/ublkc{number} open"
                )
            await asyncio.sleep(_POLL_S)

    async def start_recovery(self, deadline_s: float) -> None:
        """START_USER_RECOVERY, tried again while the driver answers EBUSY: a process has the device open.

        Workers may have died since an earlier recovery, of this daemon's or of one before it, with any tags fetched.  A
        driver that offers QUIESCE_DEV (Linux 6.16) forgets those tags at the last close of the device; an older driver
        must first see every queue fetched.
        """
        number, info = self.number, self.info
        if not self._features & Feature.QUIESCE:
            await self._retry_busy(
                "FETCH_REQ",
                # Its process must end with it: the tags that it has fetched are given up then.
                self._ours_here(lambda: control.complete_fetch_round(number, info.queues, info.depth)),
                deadline_s,
            )
        await self._retry_busy("START_USER_RECOVERY", self._ours(control.start_recovery, number), deadline_s)

    @property
    def tears_siblings(self) -> bool:
        """Whether one worker's death in a recovery takes the other queues' tags, and the driver forgets that it did.

        So before Linux 6.15: if the device became live then, its requests would go to commands that are gone: a panic.
        """
        return self.info.queues > 1 and not self._features & Feature.QUIESCE

    async def end_recovery(self, deadline_s: float, begun: asyncio.Event, check: Call | None = None) -> None:
        """END_USER_RECOVERY, unless `check` raises.

        It waits until every tag is fetched; then the driver sends the dead workers' requests again.  `begun` is set
        when the command is about to wait in the kernel.  Raises `ControlFailed`, also for what `check` raises.
        """
        if check is None:
            command = self._ours(control.end_recovery, self.number, os.getpid())
        else:
            command = self._checked(check, control.end_recovery, self.number, os.getpid())
        await self._retry_busy("END_USER_RECOVERY", command, deadline_s, begun)

    def _checked(self, check: Call, command: Callable[..., T], *arguments: Any) -> Call:
        """The command, unless `check` raises right before it in the same process; `check` is given one descriptor."""
        (fd,) = check.fds
        plain = Call(check.function, *check.arguments)
        return Call(
            device_commands.ours_checked, self.number, self.mark, plain, command, *arguments, fds=[fd]
        )

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
                return await self._command_beside(what, command, deadline_s, begun)
            except ControlFailed as error:
                busy = error.errno in (errno.EBUSY, errno.EINTR)
                if not busy or asyncio.get_running_loop().time() > until_s:
                    raise
            await asyncio.sleep(_POLL_S)

    async def _command_beside(
        self,
        what: str,
        command: Callable[[], None],
        deadline_s: float,
        begun: asyncio.Event | None = None,
    ) -> None:
        """Run a command of `_ours` without a turn.  Raises `ControlFailed`."""
        await self._runner.run_beside(f"{self._name}: {what}", command, type(None), deadline_s, begun)

    @property
    def can_try_stop(self) -> bool:
        """Whether the driver has `try_stop` (Linux 7.0)."""
        return bool(self._features & Feature.SAFE_STOP_DEV)

    async def try_stop(self, deadline_s: float) -> bool:
        """TRY_STOP_DEV: STOP_DEV, unless the disk or a partition is open; whether it stopped.  Raises `ControlFailed`.

        The driver counts openers under the disk's `open_mutex`, and lets no process open it from there on
        (ublk_ctrl_try_stop_dev): no process can open the disk between the check and the stop.
        """
        number = self.number
        try:
            await self._command_beside(
                "TRY_STOP_DEV", self._ours(control.try_stop_device, number), deadline_s
            )
        except ControlFailed as error:
            if error.errno == errno.EBUSY:
                return False
            # ENODEV: another program has stopped the disk, so it has no users.
            if error.errno != errno.ENODEV:
                raise
        return True

    async def stop(self, deadline_s: float) -> None:
        """STOP_DEV: the disk goes, then every fetched tag is cancelled.  Raises `ControlFailed`."""
        number = self.number
        await self._command_beside("STOP_DEV", self._ours(control.stop_device, number), deadline_s)

    async def publish_name(self) -> None:
        """Have udev link the disk as /dev/ublkpool/NAME (`disk_names`); if it cannot be, the reason is logged."""
        name, disk = self._name, self.node.name
        if not DiskNames().are_wanted:
            return
        number, mark = self.number, self.mark
        try:
            why = await self._look(
                f"naming {disk}",
                Call(device_commands.publish_name, name, disk, number, mark),
                str,
            )
        except ControlFailed as error:
            why = without_name(name, str(error))
        if why:
            _log.warning("%s: it has no link /dev/ublkpool/%s: %s", name, name, why)

    async def _withdraw_name(self) -> bool:
        """After the disk's end: return when no link leads to its number; false if the disk has not ended."""
        name, disk = self._name, self.node.name
        if not DiskNames().are_wanted:
            return True
        try:
            return await self._look(
                f"removing the links to {disk}", Call(device_commands.withdraw_name, name, disk), bool
            )
        except ControlFailed as error:
            _log.warning("%s: links to %s may be left: %s", name, disk, without_name(name, str(error)))
            return True

    def let_go(self) -> None:
        """This daemon serves it no more."""
        if self.opener is not None:
            self.opener.let_end()

    async def delete(self) -> None:
        """DEL_DEV_ASYNC, when no worker has /dev/ublkcN open any more.  Raises `ControlFailed`.

        DEL_DEV would wait until no process has the disk mounted or open, and make every other command wait.
        """
        number, mark = self.number, self.mark
        # Another server may get the number as soon as it is free.
        is_withdrawn = await self._withdraw_name()
        is_free = await self._runner.run(
            f"{self._name}: DEL_DEV", Call(device_commands.delete, number, mark), bool
        )
        if not is_withdrawn:
            await self._withdraw_name()
        if not is_free:
            _log.warning(
                "%s: a process still has its disk mounted or open; number %d is free when it lets go",
                self._name,
                number,
            )
