"""A device's pool over the lives of its backends, and when the next backend needs other memory.

A pool's memory cannot be taken back from a process that has it.  So a backend gets its predecessor's memory only if the
kernel says that no process outside the daemon has it open, and if both backends run as the same user.  Otherwise the
pool gets other memory, and the workers copy there what requests have in the old.  Owns that decision, the arena and its
descriptor in the holder.  Runs on the supervisor's asyncio loop.
"""

import logging
import os

from ublkpool.bufpool.errors import PoolError
from ublkpool.bufpool.pool.arena import Arena
from ublkpool.bufpool.pool.memory import Data, DataPlan, fill_data, huge_bytes, make_data, open_data
from ublkpool.daemon.device.team import Team
from ublkpool.daemon.kernel.allocation import AT_ONCE_BYTES_MAX, allocate_beside
from ublkpool.daemon.kernel.control_process import ControlFailed, ControlRunner
from ublkpool.daemon.plain_call import Call
from ublkpool.daemon.processes.held_names import pool_name
from ublkpool.daemon.processes.holder import Holder
from ublkpool.daemon.processes.open_files import is_open_elsewhere

_log = logging.getLogger("ublkpool.device")


class Pool:
    """The pool of one device."""

    def __init__(self, device: str, holder: Holder, runner: ControlRunner) -> None:
        """Without memory until `begin` or `resume`."""
        self._runner = runner
        self.arena: Arena | None = None
        self._device = device
        self._holder = holder
        self._is_fresh = False
        self._user: int | None = None

    def begin(self, arena: Arena) -> None:
        """The pool is new: no backend has had this memory."""
        self.arena = arena
        self._is_fresh, self._user = True, None
        self._holder.hold(pool_name(self._device), arena.data_fd)

    def resume(self, arena: Arena) -> None:
        """Go on with an earlier daemon's pool; the user of its last backend is unknown until `had_by`."""
        self.arena = arena
        self._is_fresh, self._user = False, None
        self._holder.hold(pool_name(self._device), arena.data_fd)

    def take(self, prepared: "Pool") -> None:
        """Go on with the memory of a prepared device, which no backend has had; `hold` comes next."""
        assert self.arena is None
        self.arena, prepared.arena = prepared.arena, None
        self._is_fresh, self._user = True, None

    def hold(self) -> None:
        """Have the holder keep the memory.  Raises `OSError`."""
        assert self.arena is not None
        self._holder.hold(pool_name(self._device), self.arena.data_fd)

    def had_by(self, user: int) -> None:
        """A backend of this user has the memory."""
        self._is_fresh, self._user = False, user

    async def allocate(self, plan: DataPlan) -> Data:
        """Make the memory, in a process of its own if it is large: a gigabyte takes seconds.  Raises `PoolError`."""
        if plan.size_bytes <= AT_ONCE_BYTES_MAX:
            return make_data(*plan)
        fd = open_data(plan.what, plan.size_bytes)
        try:
            trouble = await allocate_beside(
                self._runner,
                self._device,
                f"{self._device}: {plan.what} of {plan.size_bytes} bytes cannot be allocated",
                Call(_fill, plan, fds=[fd]),
                [fd],
            )
        except ControlFailed as error:
            os.close(fd)
            raise PoolError(str(error)) from error
        except BaseException:
            os.close(fd)
            raise
        try:
            if trouble:
                raise PoolError(trouble)
            return Data(fd, 0 if plan.huge == "off" else huge_bytes(fd, plan.size_bytes))
        except PoolError:
            os.close(fd)
            raise

    async def prepare(self, team: Team, user: int) -> None:
        """Make the memory fit for the next backend, which runs as this user: replace it if another process may have it.

        Raises `PoolError`, `AttachRefused`, `DaemonError`; then a retry may succeed.
        """
        if self.arena is not None and (reason := self._unfit(self.arena, user)):
            if team.can_change_pool:
                _log.warning("%s: its pool gets other memory for the next backend: %s", self._device, reason)
                await self._replace(self.arena, team)
            else:
                _log.warning(
                    "%s: its workers are of an earlier version, and the next backend gets the memory of the last one "
                    "though %s",
                    self._device,
                    reason,
                )
        self.had_by(user)

    def _unfit(self, arena: Arena, user: int) -> str:
        """Why the next backend cannot have this memory; empty if it can."""
        if self._is_fresh:
            return ""
        if not arena.is_sealed:
            return "an earlier version made it, and its size is not sealed"
        if self._user is None:
            return "the user of its last backend is not known"
        if self._user != user:
            return f"a backend of user {self._user} had it, and the next is user {user}'s"
        return "a process still has it from an earlier backend" if is_open_elsewhere(arena.data_fd) else ""

    async def _replace(self, arena: Arena, team: Team) -> None:
        # If a worker fails to change, the next attempt must replace the memory again.
        self._is_fresh, self._user = False, None
        arena.replace_data(await self.allocate(arena.next_data))
        self._holder.hold(pool_name(self._device), arena.data_fd)
        await team.change_pool()
        arena.forget_old_data()

    def remove(self) -> None:
        """Remove the pool.  Raises `PoolError` if the control segment's name stays."""
        try:
            if self.arena is not None:
                self.arena.unlink()
        finally:
            self.close()
            # The memory goes now, even if the kernel's device stays.
            self._holder.drop(pool_name(self._device))

    def close(self) -> None:
        """Unmap it here; the holder and the workers still have it."""
        if self.arena is not None:
            self.arena.close()
            self.arena = None


def _fill(fd: int, plan: DataPlan) -> str:
    """Runs in a process of its own: allocate and seal the memory; why that failed, or nothing."""
    try:
        fill_data(fd, *plan)
    except PoolError as error:
        return str(error)
    return ""
