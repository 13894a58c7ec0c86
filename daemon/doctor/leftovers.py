"""What dead daemons of this run directory left, read from their records; and the code that recorded workers run."""

import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

import ublkpool
from ublkpool.daemon.device.prepared import is_reserved
from ublkpool.daemon.device.records import NO_RECORD, Record, unknown_here
from ublkpool.daemon.doctor.daemon import DaemonAnswer
from ublkpool.daemon.doctor.finding import Finding, some
from ublkpool.daemon.kernel.device_commands import Owned
from ublkpool.daemon.processes.left_behind import Process
from ublkpool.ublk.abi import DeviceState

CHECK = "leftovers"
VERSIONS = "versions"
_SHOWN_MAX = 10


class Recorded(NamedTuple):
    """The records of a run directory, the files that are none, and whether all could be read.

    `later` are records of a later version, each with what this version does not know.
    """

    records: Sequence[Record] = ()
    unreadable: Sequence[str] = ()
    denied: bool = False
    later: Sequence[str] = ()


def read_records(run_dir: Path) -> Recorded:
    """Read, and change nothing; the daemon's own `Records.load` renames a damaged file."""
    directory = run_dir / "devices"
    try:
        names = sorted(each.name for each in directory.iterdir())
    except FileNotFoundError:
        return Recorded()
    except OSError:
        return Recorded(denied=True)
    unreadable = [name for name in names if name.endswith(".unreadable")]
    records: list[Record] = []
    later: list[str] = []
    denied = False
    for name in (each for each in names if each.endswith(".json")):
        try:
            records.append(msgspec.json.decode((directory / name).read_bytes(), type=Record))
        except FileNotFoundError:
            continue
        except OSError:
            denied = True
        except NO_RECORD as error:
            unknown = unknown_here(error)
            (later if unknown else unreadable).append(f"{name} ({unknown})" if unknown else name)
    return Recorded(records, unreadable, denied, later)


def leftover_findings(
    run_dir: Path, answer: DaemonAnswer, recorded: Recorded, is_alive: Callable[[Process], bool]
) -> list[Finding]:
    """Devices on record without a daemon, and records that no daemon can read."""
    found = []
    if recorded.denied:
        says = f"the records in {run_dir} cannot be read by this user"
        found.append(Finding(CHECK, "warn", says, "sudo ublkpool doctor"))
    if recorded.later:
        says = f"{run_dir}/devices has records of a later version, which this one refuses: {some(recorded.later)}"
        found.append(Finding(CHECK, "fail", says, "start the daemon of that version again"))
    if recorded.unreadable:
        says = f"{run_dir}/devices has records that no daemon can read: {some(recorded.unreadable)}"
        way_out = "if the kernel still has their devices, `lost-devices` names them; then remove the files"
        found.append(Finding(CHECK, "warn", says, way_out))
    if answer.is_gone:
        found += _without_daemon(run_dir, answer, recorded.records, is_alive)
    return found or [Finding(CHECK, "ok", "no dead daemon left anything in the run directory")]


def _without_daemon(
    run_dir: Path, answer: DaemonAnswer, records: Sequence[Record], is_alive: Callable[[Process], bool]
) -> list[Finding]:
    way_out = f"ublkpool serve --run-dir {run_dir} goes on with what is left"
    served = [each.config.name for each in records if each.live and _has_workers(each, is_alive)]
    # The next daemon removes prepared devices, which no request waits for.
    devices = [each.config.name for each in records if not is_reserved(each.config.name)]
    unserved = [each for each in devices if each not in served]
    found = []
    if unserved:
        says = f"a daemon ended without its devices, which no worker serves: {some(unserved)}: their requests wait"
        found.append(Finding(CHECK, "fail", says, way_out))
    if served:
        says = (
            f"workers serve devices without a daemon, and nothing replaces a worker that dies: {some(served)}"
        )
        found.append(Finding(CHECK, "warn", says, way_out))
    if answer.state == "dead" and not records:
        found.append(
            Finding(CHECK, "warn", f"a daemon that was killed left its sockets in {run_dir}", way_out)
        )
    return found


def _has_workers(record: Record, is_alive: Callable[[Process], bool]) -> bool:
    return bool(record.workers) and all(is_alive(each.process) for each in record.workers)


def lost_findings(
    look: Callable[[], Sequence[Owned]], read: Callable[[], Recorded], may_ask: bool
) -> list[Finding]:
    """Devices that the kernel has of a daemon of this run directory, and that are on no record.

    `look` asks the driver; it is called twice, since a daemon that runs may remove a device meanwhile.  `may_ask`:
    whether the driver answers this user.
    """
    check = "lost-devices"
    first = _lost(look, read) if may_ask else None
    if first is None:
        says = "whether the kernel has devices that are on no record is not known: this user may not look"
        return [Finding(check, "warn", says, "sudo ublkpool doctor")]
    again = _lost(look, read) if first else []
    lost = [each for each in again or [] if each in first]
    if not lost:
        return [Finding(check, "ok", "every kernel device of this run directory's daemons is on record")]
    return [_lost_words(check, each) for each in lost[:_SHOWN_MAX]]


def _lost(look: Callable[[], Sequence[Owned]], read: Callable[[], Recorded]) -> list[Owned] | None:
    """None if the records cannot be read."""
    owned, recorded = look(), read()
    known = {each.device_mark for each in recorded.records}
    return None if recorded.denied else [each for each in owned if each.mark not in known]


def _lost_words(check: str, lost: Owned) -> Finding:
    number, way_out = lost.number, f"ublkpool serve, then: ublkpool del lost-{lost.number}"
    says = f"kernel device {number} is of a daemon of this run directory (process {lost.server_pid}) and on no record"
    if lost.state == DeviceState.DEAD:
        return Finding(check, "warn", f"{says}; it has no disk", way_out)
    return Finding(
        check, "fail", f"{says}: requests to /dev/ublkb{number} may wait for ever", f"unmount it; {way_out}"
    )


def version_findings(recorded: Recorded, build: str) -> list[Finding]:
    """The installed code (`build`), and the workers on record that run other code."""
    says = f"ublkpool {ublkpool.__version__}, code {build}, Python {platform.python_version()}"
    found = [Finding(VERSIONS, "ok", says)]
    others = [each for each in recorded.records if each.workers and each.build not in ("", build)]
    if others:
        builds = some(sorted({each.build for each in others}))
        says = f"workers run other code ({builds}) than this command: {some(each.config.name for each in others)}"
        way_out = (
            "systemctl restart ublkpool, or ublkpool serve --replace, from the installation that shall serve"
        )
        found.append(Finding(VERSIONS, "warn", says, way_out))
    return found
