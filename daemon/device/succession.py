"""From one supervisor to the next: the record of a device, and what the next supervisor can go on with.

A supervisor may be killed at any moment.  Its record names the processes that served the device; the holder has the
descriptors that lead to them.  If record, processes and descriptors fit together, the next supervisor goes on with the
same workers, broker and backend, and no request notices; else it ends these processes and recovers the device in a new
epoch.
"""

import os
import socket
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

import msgspec

from ublkpool.daemon.backends.session import Session
from ublkpool.daemon.device.disk import Disk
from ublkpool.daemon.device.records import Record, Served, Worker
from ublkpool.daemon.device.team import Team
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.kernel.block_device import BlockDevice
from ublkpool.daemon.kernel.client_area import AreaRecord
from ublkpool.daemon.kernel.control_process import ControlRunner
from ublkpool.daemon.processes.held_names import session_names, worker_name
from ublkpool.daemon.processes.left_behind import Process, identify, is_alive
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.daemon.status import State
from ublkpool.ublk.abi import DeviceState


def record_of(
    config: DeviceConfig,
    kernel: BlockDevice | None,
    disk: Disk | None,
    team: Team | None,
    session: Session | None,
    managed_pid: int | None,
    *,
    state: State,
    going: bool,
    broker: Process | None,
    segments: int,
    clients: AreaRecord | None,
    build: str,
    epoch: int,
    mark: int = 0,
    data_lost: str = "",
    added: DeviceConfig | None = None,
    drained: bool = False,
    drain_is_open: bool = False,
) -> Record:
    """The record of a device, for the next supervisor."""
    workers = _workers_of(team)
    backend = identify("backend", session.pid) if session else None
    own = identify("backend", managed_pid) if managed_pid is not None else None
    others = dict.fromkeys((broker, backend, own))
    return Record(
        config=config,
        device_number=kernel.number if kernel else None,
        device_mark=kernel.mark if kernel else mark,
        disk=disk,
        epoch=epoch,
        processes=tuple(each.process for each in workers) + tuple(each for each in others if each),
        going=going,
        live=state == "live" and not going,
        workers=workers,
        served=_served_by(session),
        managed=own,
        segments=segments,
        clients=clients,
        build=build,
        data_lost=data_lost,
        added=added,
        drained=drained,
        drain_is_open=drain_is_open,
    )


def _workers_of(team: Team | None) -> tuple[Worker, ...]:
    return tuple(
        Worker(process, each.cpu)
        for each in (team.workers if team else ())
        if (process := each.child.identified("worker")) is not None
    )


def _served_by(session: Session | None) -> Served | None:
    if session is None:
        return None
    # An earlier version reads the attach message, and refuses fields that it does not know.
    attach = msgspec.structs.replace(session.attach, resizes=False, owner="")
    token, generation = session.token.hex(), session.generation
    return Served(attach, token, session.segment, generation, session.attach.resizes)


def may_go_on(record: Record, held: Mapping[str, int]) -> bool:
    """Whether the device was live when its supervisor died, and all of its workers live and can be reached."""
    names = [worker_name(record.config.name, queue) for queue in range(len(record.workers))]
    return (
        record.live
        and bool(record.workers)
        and all(is_alive(each.process) for each in record.workers)
        and all(name in held for name in names)
    )


class AdoptedDevice(NamedTuple):
    """What a device goes on with: kernel device, workers with their sockets, record, the holder's descriptors."""

    kernel: BlockDevice
    workers: Sequence[tuple[Worker, socket.socket]]
    record: Record
    held: Mapping[str, int]

    @classmethod
    async def of(cls, record: Record, held: Mapping[str, int], runner: ControlRunner) -> Self:
        """Raises `DaemonError` unless the kernel has the device, live, with a queue for each worker on record."""
        assert record.device_number is not None
        name = record.config.name
        kernel = await BlockDevice.find(runner, name, record.device_number, record.device_mark)
        if kernel is None or kernel.info.state != DeviceState.LIVE:
            raise DaemonError(f"{name}: the kernel has no such device that is live")
        if len(record.workers) != kernel.info.queues:
            raise DaemonError(f"{name}: {len(record.workers)} workers for {kernel.info.queues} queues")
        sockets = [_socket(held[worker_name(name, queue)]) for queue in range(kernel.info.queues)]
        return cls(kernel, tuple(zip(record.workers, sockets, strict=True)), record, held)

    def session(self) -> Session | None:
        """The backend's session; None if none was on record, or its connection was not held.  Raises `OSError`."""
        connection, segment = (self.held.get(name) for name in session_names(self.record.config.name))
        served = self.record.served
        if served is None or connection is None or (segment is None) != (served.attach.segment_bytes == 0):
            return None
        token = bytes.fromhex(served.token)
        own = None if segment is None else os.dup(segment)
        sock = None
        try:
            sock = _socket(connection)
            attach = msgspec.structs.replace(served.attach, resizes=served.resizes)
            return Session.adopt(sock, attach, own, token, served.segment, served.generation)
        except OSError:
            # Without a pidfd this daemon could not see the backend's death.
            if own is not None:
                os.close(own)
            if sock is not None:
                sock.close()
            raise


def _socket(fd: int) -> socket.socket:
    sock = socket.socket(fileno=os.dup(fd))
    sock.setblocking(False)
    return sock
