"""What the commands show in the situations of docs/symptoms: numbers and events made here, words of the product."""

import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from msgspec import structs

from support.fakes.top_readings import ABSENT, BEGIN_S, DEATH, Load, readings
from ublkpool.daemon.cli.doctor import as_text
from ublkpool.daemon.cli.render import device_table, plain_text
from ublkpool.daemon.cli.top.reading import Reading, Share
from ublkpool.daemon.doctor.directories import shm_findings, state_directory_findings
from ublkpool.daemon.doctor.finding import report_of
from ublkpool.daemon.doctor.system import StatVfs, System
from ublkpool.daemon.events.event import Event, make_event, render, shown_time
from ublkpool.daemon.events.kinds import (
    BackendCutOff,
    BackendDied,
    BackendReplaced,
    Details,
    DeviceFailed,
    RecoveryBegun,
    RecoveryEnded,
    RequestLate,
    WorkerDied,
)
from ublkpool.daemon.metrics.usage import Owner
from ublkpool.daemon.rates import Meter
from ublkpool.daemon.status import CUT_OFF_REASONS, DeviceStats
from ublkpool.ublk.queue import VIOLATIONS

TIMEOUT_S = 30.0
_SILENT = VIOLATIONS[CUT_OFF_REASONS.index("silence") + 1]


def waiting_devices(width: int) -> str:
    """`ublkpool list`: a backend was killed, another store was brought, a device is drained."""
    loads = [
        Load("db-data", 0, 0, 4096, 80, 4, 512, "file"),
        Load(
            "db-journal", 0, 0, 4096, 80, 1, 16, "file", "recovering",
            f"{ABSENT}: backend file ended: killed by SIGKILL",
        ),
        Load(
            "vm-old", 0, 0, 4096, 80, 1, 20, None, "recovering",
            f"{ABSENT}: device vm-old is served from /srv/old.img, this backend brings /srv/new.img: bring the "
            "first one back, or accept this one with: ublkpool rebind vm-old",
        ),
        Load(
            "wiki", 0, 0, 4096, 80, 1, 8, "file", "recovering",
            "drained: requests wait for: ublkpool resume wiki",
        ),
    ]  # fmt: skip
    [statuses] = [each.statuses for each in islice(readings(loads), 1)]
    shown = [
        each
        if each.state == "live"
        else structs.replace(each, backend=structs.replace(each.backend, pid=None))
        for each in statuses
    ]
    return plain_text(device_table(shown), width)


def silent_backend(served: int = 21, silent: int = 34) -> list[Reading]:
    """Readings of a device whose backend serves for so many seconds, and then answers nothing for so many."""
    load = Load("vol0", 2100, 900, 16384, 420, 2, 64, "file")
    found = list(islice(readings([load]), served))
    last = found[-1]
    [stats] = [each.stats for each in last.interval.devices]
    meter = Meter()
    meter.read([stats], 0.0, "")
    for second in range(1, silent + 1):
        time = shown_time(BEGIN_S + served - 1 + second)
        interval = meter.read([_silent(stats, float(second))], float(second), time)
        shares = {
            owner: share if not owner.device else share._replace(cpu=0.0)
            for owner, share in last.shares.items()
        }
        found.append(last._replace(interval=interval, shares=shares, events=_late(second, served)))
    return found


def _silent(stats: DeviceStats, silent_s: float) -> DeviceStats:
    queues = [
        structs.replace(each, in_flight=32, buffers_held=36, oldest_request_s=silent_s)
        for each in stats.queues
    ]
    lent = 32 * len(queues)
    pool = structs.replace(stats.pool, lent_count=lent, free_count=stats.pool.buffer_count - lent - 8)
    return structs.replace(stats, queues=tuple(queues), pool=pool)


def _late(second: int, served: int) -> list[Event]:
    if second != int(TIMEOUT_S) + 1:
        return []
    text = f"a request has waited longer than io_timeout = {TIMEOUT_S:g} s"
    return [
        make_event(
            200 + queue, BEGIN_S + served - 1 + second, "vol0",
            RequestLate(queue=queue, io_timeout_s=TIMEOUT_S), text, None,
        )
        for queue in range(2)
    ]  # fmt: skip


def growing_backend(minutes: int = 60) -> list[Reading]:
    """Readings of a device, one a minute, whose backend needs more memory each time."""
    load = Load("vol0", 410, 64, 131072, 5200, 2, 2048, "store.py")
    backend = Owner("backend", load.name)
    return [
        each._replace(shares={**each.shares, backend: Share(0.21, (310 + 97 * minute) << 20)})
        for minute, each in enumerate(islice(readings([load], 60.0), minutes))
    ]


def killed_workers() -> str:
    """`ublkpool events`: something kills a device's workers until it fails."""
    reason = f"queue 0: {DEATH}"
    told: list[_Told] = []
    at_s = 0.0
    for life in range(6):
        told.append((at_s, WorkerDied(queue=0, pid=2100 + 2 * life, reason=reason), reason))
        if life == 5:
            told.append((at_s + 0.001, DeviceFailed(reason=reason), reason))
            break
        seconds = 0.412 + 0.009 * life
        told.append((at_s + 0.001, RecoveryBegun(reason=reason, epoch=life + 1), f"{reason}; recovering"))
        ended = RecoveryEnded(served=True, epoch=life + 2, seconds=seconds, replayed=12)
        again = f"recovered, epoch {life + 2}, after {seconds:g} s, 12 requests are sent again"
        told.append((at_s + seconds, ended, again))
        at_s += seconds + 0.9
    return _events(told)


def flapping_backend() -> str:
    """`ublkpool events`: a backend that is killed, then one that is cut off."""
    died = "backend store.py has ended (process {})"
    back = "backend store.py (process {}) serves in the place of process {}, after {:g} s; requests sent again: {}"
    told: list[_Told] = []
    at_s = 0.0
    for pid, following, seconds, replayed, cut_off in (
        (4211, 4272, 0.9, 7, False),
        (4272, 4336, 1.1, 16, False),
        (4336, 4390, 1.2, 31, True),
    ):
        if cut_off:
            cut = BackendCutOff(reason=_SILENT, pid=pid, queue=1)
            told.append((at_s - 0.004, cut, f"backend cut off: {_SILENT}"))
        told.append((at_s, BackendDied(kind="store.py", pid=pid, was_cut_off=cut_off), died.format(pid)))
        replaced = BackendReplaced(
            kind="store.py", pid=following, earlier_pid=pid, seconds=seconds, replayed=replayed
        )
        told.append((at_s + seconds, replaced, back.format(following, pid, seconds, replayed)))
        at_s += 431.7
    return _events(told)


def full_directories(scratch: Path) -> str:
    """What is wrong in `ublkpool doctor` where the state directory and /dev/shm have no room."""
    root, state = scratch / "root", scratch / "state"
    for each in (root / "dev/shm", state):
        each.mkdir(parents=True)
    system = System(root, scratch / "run", (state,), "6.12.107+deb13-cloud-amd64", True)
    findings = [
        *state_directory_findings(system, _room(310 << 10)),
        *shm_findings(system, (), True, _room(12 << 10)),
    ]
    lines = [
        line.replace(str(state), "/var/lib/ublkpool") for line in as_text(report_of(findings)).splitlines()
    ]
    return "\n".join(lines[:-1])


def _room(free_bytes: int) -> StatVfs:
    return lambda path: os.statvfs_result((1, 1, 1 << 40, free_bytes, free_bytes, 100, 100, 100, 0, 255))


_Told = tuple[float, Details, str]


def _events(told: Sequence[_Told]) -> str:
    """The output of `ublkpool events` for events of vol0, which happened so many seconds after a moment."""
    made = [
        make_event(310 + number, BEGIN_S + at_s, "vol0", details, text, None)
        for number, (at_s, details, text) in enumerate(told)
    ]
    return "\n".join(map(render, made))
