"""What others may ask of a device: its state, its status, its trouble, its disk.

Owns the wording; reads the parts and changes none.
"""

from collections.abc import Callable

from ublkpool.bufpool import wire
from ublkpool.bufpool.pool.arena import Arena
from ublkpool.daemon.backends.session import Session
from ublkpool.daemon.device.opening import described_bytes, may_create, size_bytes
from ublkpool.daemon.device.parts import DeviceParts
from ublkpool.daemon.settings.changes import differences, shown
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.daemon.status import BackendStatus, ClientStats, DeviceStatus, State, WorkerStatus
from ublkpool.ublk import abi


class DeviceView:
    """A device, as far as it only tells."""

    def __init__(self, parts: DeviceParts) -> None:
        self.parts = parts

    def on_change(self, call: Callable[[], None]) -> None:
        """Have `call` called after every change of the state; the last one given counts."""
        self.parts.life.on_change = call

    @property
    def config(self) -> DeviceConfig:
        """Its present settings."""
        return self.parts.config

    @property
    def name(self) -> str:
        """The config's name of it."""
        return self.config.name

    @property
    def mark(self) -> int:
        """Of the kernel's device, this daemon's or one that an earlier daemon left; 0 if there is none."""
        resources, left = self.parts.resources, self.parts.left
        if resources.kernel is not None:
            return resources.kernel.mark
        return resources.mark or (left.device_mark if left is not None else 0)

    @property
    def state(self) -> State:
        """The state that decides what comes next."""
        return self.parts.life.state

    @property
    def shown(self) -> State:
        """The state that users are told, see `Lifecycle.shown`."""
        return self.parts.life.shown

    @property
    def reason(self) -> str:
        """Why the device failed; empty if it did not."""
        return self.parts.life.reason

    @property
    def trouble(self) -> str:
        """Why requests are not served; empty if they are."""
        life, backend = self.parts.life, self.parts.backend
        if life.state == "failed":
            return life.reason
        reasons = [life.trouble if life.state in ("recovering", "quiesced") else ""]
        if backend.session is None and self.config.has_backend_process:
            reasons.append(_why_no_backend(self.parts))
        reasons.append(backend.due_greetings(self.parts.resources.team))
        return "; ".join(filter(None, reasons))

    @property
    def session(self) -> Session | None:
        """The attached backend."""
        return self.parts.backend.session

    @property
    def lacks_backend(self) -> bool:
        """Whether requests wait for a backend to attach."""
        if self.parts.drain and self.parts.left is not None:
            # Its takeover comes first, and only then can it be resumed.
            return False
        return self.config.has_backend_process and (self.session is None or self.session.is_gone)

    @property
    def memory_bytes(self) -> int:
        """What the daemon has made or will make for the device, see `memory.py`; 0 once it has failed.

        A device that could not be taken over may still have what an earlier daemon made.
        """
        resources, is_left = self.parts.resources, self.parts.left is not None
        has_none = self.state == "failed" and resources.arena is None and not is_left
        return 0 if has_none else resources.memory_bytes

    @property
    def arena(self) -> Arena | None:
        """The pool."""
        return self.parts.resources.arena

    def status(self) -> DeviceStatus:
        """What `list` shows."""
        config, resources = self.config, self.parts.resources
        kernel, team = resources.kernel, resources.team
        info = kernel.info if kernel else None
        limits = resources.limits
        return DeviceStatus(
            name=config.name,
            id=info.device_number if info else config.id,
            path=str(kernel.node) if kernel and self.state != "waiting" else None,
            state=self.shown,
            size_bytes=size_bytes(self.parts),
            config_size_bytes=_overruled_bytes(self.parts),
            queues=info.queues if info else config.queues,
            depth=config.depth,
            need_get_data=config.asks_for_data,
            zero_copy=config.zero_copy,
            placement=config.placement,
            answers=config.answers,
            isolation=config.isolation,
            recovery=config.recovery,
            flags=tuple(abi.feature_names(info.flags)) if info else (),
            workers=tuple(
                WorkerStatus(queue=each.queue, pid=each.child.pid, cpu=each.cpu)
                for each in (team.workers if team else ())
            ),
            backend=_backend_status(self.parts),
            reason=self.trouble,
            epoch=resources.epoch,
            drain=self.parts.drain,
            differs=tuple(_differs(self.parts)),
            iops_max=limits.iops,
            bytes_per_s_max=limits.bytes_per_s,
            burst_s=limits.burst_ns / 1e9,
            memory_bytes=self.memory_bytes,
        )

    @property
    def cut_offs(self) -> dict[str, int]:
        """How often its backends were cut off, by reason."""
        return self.parts.backend.cut_offs.counts()

    def client_stats(self) -> ClientStats:
        """How many slices of the client area are lent, resting and free."""
        area, (lent, resting, free) = self.parts.resources.area, self.parts.clients.counts()
        size_bytes = area.slice_bytes if area else 0
        return ClientStats(slice_bytes=size_bytes, lent_count=lent, resting_count=resting, free_count=free)

    def describe(self) -> wire.Described:
        """What a backend may know before it attaches."""
        config, kernel = self.config, self.parts.resources.kernel
        return wire.Described(
            v=wire.PROTOCOL_VERSION,
            device=config.name,
            size_bytes=described_bytes(self.parts),
            max_io_bytes=config.max_io_bytes,
            need_get_data=config.need_get_data,
            placement=config.placement,
            read_only=config.read_only,
            path=str(kernel.node) if kernel else "",
            may_create=may_create(self.parts),
            takes_next=self.parts.binding.takes_next(),
            knows_survival=True,
            knows_resize=True,
            resized_bytes=self.parts.resized_bytes,
            knows_optimal_io=True,
            knows_leaving=True,
            former_owner=_former_owner(self.parts),
            takes_over=self.parts.binding.takes_over(),
        )

    async def live(self) -> None:
        """Return when the device is live.  Raises `DaemonError` with the reason if it fails first."""
        await self.parts.life.live()

    async def settled(self) -> None:
        """Return when no task changes this device."""
        await self.parts.life.settled()


def _differs(parts: DeviceParts) -> list[str]:
    config, configured = parts.in_use, parts.configured
    keys = differences(config, configured)
    is_grown = config is not parts.config
    if "size" in keys and is_grown and parts.resized_bytes >= (configured.size_bytes or 0):
        # The size on record wins: `config_size_bytes` tells it.
        keys.remove("size")
    return [f"{key}={shown(config, key)} (config: {shown(configured, key)})" for key in keys]


def _former_owner(parts: DeviceParts) -> str:
    """The owner on record, if its process has ended: only then may its lock be broken."""
    session = parts.backend.session
    return parts.binding.owner if session is None or session.is_gone else ""


def _overruled_bytes(parts: DeviceParts) -> int | None:
    """The config's size, if a resize has given the device another."""
    wanted = parts.configured.size_bytes
    return wanted if wanted is not None and wanted < parts.resized_bytes else None


def _backend_status(parts: DeviceParts) -> BackendStatus:
    if session := parts.backend.session:
        return BackendStatus(kind=session.attach.kind, pid=session.pid, attached=True)
    kind = parts.config.backend.kind if parts.config.backend else None
    if parts.config.isolation == "none":
        team = parts.resources.team
        return BackendStatus(kind=kind, attached=team is not None and not team.unlinked())
    # The process of a drained device's backend has ended, and none is started before `resume`.
    runs = parts.managed if parts.drain != "drained" else None
    return BackendStatus(kind=kind, pid=runs.pid if runs else None, attached=False)


def _why_no_backend(parts: DeviceParts) -> str:
    if parts.drain == "drained":
        return f"drained: requests wait for: ublkpool resume {parts.config.name}"
    known = (parts.managed.trouble if parts.managed else "") or parts.backend.refusal
    if parts.life.state == "waiting":
        return known or parts.life.reason
    then = "fail" if parts.backend.is_absent_too_long else "wait"
    return f"no backend is attached, requests {then}" + (f": {known}" if known else "")
