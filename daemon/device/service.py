"""What others ask of a device at any time, in any state; none of it changes the state.

Runs on the supervisor's asyncio loop.
"""

import socket
from collections.abc import Mapping, Sequence

from ublkpool.bufpool import wire
from ublkpool.bufpool.pool.control import Limits
from ublkpool.daemon.device import client_buffers, drain, live_changes, teardown
from ublkpool.daemon.device.resize import resize
from ublkpool.daemon.device.view import DeviceView
from ublkpool.daemon.events.kinds import BackendRefused
from ublkpool.daemon.events.tell import DeviceEvents
from ublkpool.daemon.processes.background import logged
from ublkpool.daemon.settings.changes import Scalar
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.daemon.status import ResizeResult, Setting


class DeviceService(DeviceView):
    """A device, as far as it answers at any time."""

    def save(self) -> None:
        """See `DeviceParts.save`."""
        self.parts.save()

    def save_or_retry(self) -> None:
        """See `DeviceParts.save_or_retry`."""
        self.parts.save_or_retry()

    async def set(self, values: Mapping[str, Scalar]) -> None:
        """See `live_changes.apply`."""
        await live_changes.apply(self.parts, values)

    async def use_config(self, wanted: DeviceConfig) -> None:
        """See `live_changes.use_config`."""
        await live_changes.use_config(self.parts, wanted)

    async def drain(self, flush: bool, timeout_s: float | None) -> None:
        """See `drain.drain`."""
        await drain.drain(self.parts, flush, timeout_s)

    async def resume(self) -> None:
        """See `drain.resume`."""
        await drain.resume(self.parts)

    async def end_drain(self) -> None:
        """The machine goes down: the device is neither drained nor about to be.  A failure is logged."""
        await drain.cancel(self.parts)
        if self.parts.drain:
            with logged(self.config.name):
                await drain.resume(self.parts)

    def settings(self) -> Sequence[Setting]:
        """See `live_changes.settings`."""
        return live_changes.settings(self.parts)

    async def check_unused(self) -> None:
        """Return if nothing shows a user of the disk.  Raises `DaemonError` that names the users."""
        await teardown.check_unused(self.parts)

    async def describe_use(self) -> str:
        """The users of the disk in words, empty if none is seen."""
        return await teardown.describe_use(self.parts)

    def lend_buffer(self, sock: socket.socket) -> tuple[wire.BufferLeased, int | None]:
        """See `client_buffers.lend`."""
        return client_buffers.lend(self.parts, sock)

    def note_refusal(self, reason: str) -> None:
        """A backend that came was refused."""
        self.parts.backend.note_refusal(reason)
        # The line in the log is that of `Refusals`.
        self.parts.events.record(BackendRefused(reason=reason), reason)

    @property
    def events(self) -> DeviceEvents:
        """Takes what happens to the device."""
        return self.parts.events

    async def resize(self, size_bytes: int, is_relative: bool) -> ResizeResult:
        """See `resize.resize`."""
        return await resize(self.parts, size_bytes, is_relative)

    def give_up(self) -> None:
        """Fail the requests that wait for a backend, and new ones, until one attaches."""
        if self.parts.resources.team is not None:
            self.parts.resources.team.give_up()

    def lift_limits(self) -> None:
        """From now on no request waits for the device's limits."""
        if self.parts.resources.limits != Limits():
            self.parts.resources.set_limits(Limits())

    async def broker_restarted(self) -> None:
        """Tell the new broker of this device's leases; a failure is logged."""
        # Without the turn: the task that has it may be waiting for buffers that the new broker does not know of yet.
        if (leases := self.parts.resources.leases) is not None:
            with logged(self.config.name):
                await leases.refresh()
                self.parts.save_or_retry()
