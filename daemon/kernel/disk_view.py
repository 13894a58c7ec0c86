"""A disk's node in /dev, its settings in sysfs, and its users: all that needs no control command.

Runs on the supervisor's asyncio loop; every call that may wait in the kernel runs in a disposable process.
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.kernel import disk_node, disk_use
from ublkpool.daemon.kernel.control_process import LOOK_DEADLINE_S, ControlRunner
from ublkpool.daemon.kernel.disk_use import Users
from ublkpool.daemon.plain_call import Call

NODE_DEADLINE_S = 30.0
OPEN_DEADLINE_S = 600.0
IO_TIMEOUT_DEADLINE_S = 600.0
DRAIN_DEADLINE_S = 86400.0
T = TypeVar("T")


class DiskView:
    """The disk /dev/ublkbN of one device."""

    def __init__(self, runner: ControlRunner, name: str, number: int) -> None:
        """`name` is the device's, `number` the N of its disk."""
        self._runner = runner
        self._name = name
        self.number = number
        self.node = Path(f"/dev/ublkb{number}")

    async def wait_for_node(self) -> None:
        """Return when /dev/ublkbN is a block device that opens, and udev has settled.  Raises `DaemonError`.

        Linux 7.3 scans partitions after START_DEV and holds the disk's `open_mutex` meanwhile
        (ublk_partition_scan_work): an open waits there for as long as the backend takes to serve the scan.
        """
        node = str(self.node)
        if not await self._look(
            f"opening {node}", Call(disk_node.wait_until_open, node, NODE_DEADLINE_S), bool, OPEN_DEADLINE_S
        ):
            raise DaemonError(f"{self._name}: {node} did not become a block device that can be opened")

    async def is_claimed(self, deadline_s: float = LOOK_DEADLINE_S) -> bool:
        """Whether the disk or a partition has an exclusive user.  Raises `CallHung`, `ControlFailed`."""
        node = str(self.node)
        return await self._look(f"opening {node}", Call(disk_use.is_claimed, node), bool, deadline_s)

    async def users(self, deadline_s: float = LOOK_DEADLINE_S) -> Users:
        """The users of the disk that /proc and /sys show.  Raises `CallHung`, `ControlFailed`."""
        name = self.node.name
        return await self._look(
            f"looking for users of {name}", Call(disk_use.find_users, name), Users, deadline_s
        )

    async def mappers(self) -> Users:
        """The processes that have the disk mapped.  Raises `CallHung`, `ControlFailed`."""
        name = self.node.name
        return await self._look(f"looking for users of {name}", Call(disk_use.find_mappers, name), Users)

    async def has_gone(self) -> bool:
        """Whether the kernel has begun to remove the disk.  Raises `CallHung`, `ControlFailed`."""
        name = self.node.name
        return await self._look(f"looking for {name}", Call(disk_node.has_gone, name), bool)

    async def _look(
        self, what: str, work: Callable[[], Any], result: type[T], deadline_s: float = LOOK_DEADLINE_S
    ) -> T:
        return await self._runner.look(self._name, f"{self._name}: {what}", work, result, deadline_s)

    async def set_io_timeout(self, timeout_ms: int) -> None:
        """Set after how long the driver checks that a request's worker lives; the block layer's default is 30 s.

        Only this check notices a worker that dies while it holds every tag; on a living worker the timer restarts.
        """
        setting, wanted = self._io_timeout_file, str(timeout_ms)
        await self._runner.run_beside(
            f"{self._name}: io_timeout", Call(_set, setting, wanted), type(None), IO_TIMEOUT_DEADLINE_S
        )

    async def pass_requests(self) -> None:
        """Return when every request that the disk has now is answered, however long that takes.

        A change of the queue's limits waits for that (queue_limits_commit_update_frozen), in no control command: a
        recovery goes on meanwhile.  New requests wait as well.  Raises `ControlFailed`.
        """
        setting = self._setting("rotational")
        await self._runner.run_beside(
            f"{self._name}: drain", Call(_rewrite, setting), type(None), DRAIN_DEADLINE_S
        )

    @property
    def _io_timeout_file(self) -> Path:
        return self._setting("io_timeout")

    def _setting(self, name: str) -> Path:
        return Path(f"/sys/block/{self.node.name}/queue/{name}")


def _rewrite(setting: Path) -> None:
    """Runs in the disposable process."""
    setting.write_text(setting.read_text())


def _set(setting: Path, value: str) -> None:
    """Runs in the disposable process.  Before it sets even the same value the kernel waits for every request."""
    with suppress(OSError):
        if setting.read_text().strip() == value:
            return
    setting.write_text(value)
