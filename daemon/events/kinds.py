"""The kinds of events: a stable code, a severity, and the typed details of each.

Owns the codes, which scripts and alert rules rely on: a code or a field is added, never renamed or given another
meaning.  docs/EVENTS.md explains each of them, and a test compares it with this module.  A new kind is a class here and
a row there.
"""

from typing import ClassVar, Literal

import msgspec

Severity = Literal["info", "warning", "error"]


class Details(msgspec.Struct, frozen=True, kw_only=True):
    """The details of one event."""

    code: ClassVar[str] = ""
    severity: ClassVar[Severity] = "info"
    """What an event of this kind has unless its teller says another."""


class DaemonStarted(Details, frozen=True, kw_only=True):
    """A daemon serves."""

    code = "daemon-started"
    version: str
    pid: int
    after_death: bool
    """Whether the daemon before it was killed, or the machine lost its power: it has told no end."""


class DaemonStopped(Details, frozen=True, kw_only=True):
    """The daemon ends."""

    code = "daemon-stopped"
    leaves: bool
    """Whether it leaves its devices to the next daemon, still served."""


class MachineGoesDown(Details, frozen=True, kw_only=True):
    """`ublkpool shutdown` has announced the machine's end."""

    code = "machine-goes-down"


class DeviceAdded(Details, frozen=True, kw_only=True):
    """A device is on the list; `backend` is empty if the daemon runs none for it."""

    code = "device-added"
    backend: str
    queues: int


class DeviceLive(Details, frozen=True, kw_only=True):
    """A device's disk appears."""

    code = "device-live"
    path: str
    size_bytes: int


class DeviceNotStarted(Details, frozen=True, kw_only=True):
    """A start was undone."""

    code = "device-not-started"
    severity = "error"
    reason: str


class DeviceFailed(Details, frozen=True, kw_only=True):
    """A device cannot go on."""

    code = "device-failed"
    severity = "error"
    reason: str


class DeviceDeleted(Details, frozen=True, kw_only=True):
    """A device is off the list."""

    code = "device-deleted"


class DeviceAdopted(Details, frozen=True, kw_only=True):
    """A device goes on with the workers that an earlier daemon left."""

    code = "device-adopted"
    epoch: int


class SettingsChanged(Details, frozen=True, kw_only=True):
    """`ublkpool set`: these settings of a device have other values."""

    code = "settings-changed"
    values: dict[str, str]


class DeviceDrained(Details, frozen=True, kw_only=True):
    """`ublkpool drain`: requests wait, and the backend has left."""

    code = "device-drained"


class DeviceResumed(Details, frozen=True, kw_only=True):
    """`ublkpool resume`, or the machine goes down: requests go to the next backend."""

    code = "device-resumed"


class DeviceResized(Details, frozen=True, kw_only=True):
    """A live device has grown, by `ublkpool resize` or because its backend announced it; sizes are bytes."""

    code = "device-resized"
    before_bytes: int
    after_bytes: int


class StoreRebound(Details, frozen=True, kw_only=True):
    """`ublkpool rebind`: the next store that attaches becomes the device's."""

    code = "store-rebound"
    severity = "warning"


class BackendAttached(Details, frozen=True, kw_only=True):
    """A backend serves a device."""

    code = "backend-attached"
    kind: str
    pid: int
    generation: int


class BackendReplaced(Details, frozen=True, kw_only=True):
    """A backend that took another's place has greeted every queue."""

    code = "backend-replaced"
    kind: str
    pid: int
    earlier_pid: int
    seconds: float
    """Without a backend."""
    replayed: int
    """Requests that were sent again, from the end of the earlier backend until now."""


class BackendDetached(Details, frozen=True, kw_only=True):
    """A backend that the daemon asked to leave has ended; after an upgrade of the daemon, one that it runs itself."""

    code = "backend-detached"
    kind: str
    pid: int


class BackendDied(Details, frozen=True, kw_only=True):
    """A backend has ended that the daemon did not ask to leave."""

    code = "backend-died"
    severity = "warning"
    kind: str
    pid: int
    was_cut_off: bool
    """Whether the daemon killed it."""
    was_told: bool = False
    """Whether it said that it ends because it was told to, as by a service manager: then the severity is info."""


class BackendRefused(Details, frozen=True, kw_only=True):
    """A backend came and was refused."""

    code = "backend-refused"
    severity = "warning"
    reason: str


class BackendCutOff(Details, frozen=True, kw_only=True):
    """A backend is killed for what it did; `backend-died` follows."""

    code = "backend-cut-off"
    severity = "error"
    reason: str
    pid: int
    queue: int | None = None


class RequestLate(Details, frozen=True, kw_only=True):
    """A request has waited for longer than `io_timeout`."""

    code = "request-late"
    severity = "warning"
    queue: int
    io_timeout_s: float


class RequestsFail(Details, frozen=True, kw_only=True):
    """A device's policy has run out: requests fail until a backend attaches."""

    code = "requests-fail"
    severity = "error"
    why: Literal["no-backend", "machine-goes-down"]
    after_s: float
    """Without a backend."""


class WorkerDied(Details, frozen=True, kw_only=True):
    """A worker has ended that served."""

    code = "worker-died"
    severity = "error"
    queue: int
    pid: int
    reason: str


class WorkersReplaced(Details, frozen=True, kw_only=True):
    """Workers of another version were replaced; I/O paused for `seconds`."""

    code = "workers-replaced"
    epoch: int
    seconds: float


class RecoveryBegun(Details, frozen=True, kw_only=True):
    """A device's requests wait for new workers; exactly one `recovery-ended` follows, unless the daemon dies."""

    code = "recovery-begun"
    severity = "error"
    reason: str
    epoch: int
    """Of the workers that are replaced."""


class RecoveryEnded(Details, frozen=True, kw_only=True):
    """A recovery is over."""

    code = "recovery-ended"
    served: bool
    """False if the device has failed, or was deleted meanwhile."""
    epoch: int
    seconds: float
    replayed: int | None
    """Requests that the dead workers held and the kernel sends again; None if an earlier daemon's workers had them."""


class BrokerReplaced(Details, frozen=True, kw_only=True):
    """The pool broker has ended, and another one runs; of severity info if the daemon replaced it, as in an upgrade."""

    code = "broker-replaced"
    severity = "warning"
    pid: int
    reason: str


class TakeoverEnded(Details, frozen=True, kw_only=True):
    """A daemon has what an earlier one left; each list has at most 50 names, the counts are of all."""

    code = "takeover-ended"
    adopted: tuple[str, ...]
    recovered: tuple[str, ...]
    failed: tuple[str, ...]
    adopted_count: int
    recovered_count: int
    failed_count: int
    seconds: float


class CommandHung(Details, frozen=True, kw_only=True):
    """A control command, or a call that a disk answers, has not returned at its deadline."""

    code = "command-hung"
    severity = "error"
    what: str


class EventsLost(Details, frozen=True, kw_only=True):
    """Events that were shown while the daemon ran and are in no file."""

    code = "events-lost"
    severity = "warning"
    count: int
    reason: str


class EventsSuppressed(Details, frozen=True, kw_only=True):
    """Events of one code and device that came too often to be recorded."""

    code = "events-suppressed"
    severity = "warning"
    of: str
    count: int
    seconds: float


def kinds() -> dict[str, type[Details]]:
    """The kinds by their codes."""
    return {each.code: each for each in Details.__subclasses__()}
