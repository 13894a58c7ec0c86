"""The daemon of the run directory, asked on its admin socket within a few seconds."""

import socket
from contextlib import closing, suppress
from pathlib import Path
from typing import Literal

import msgspec

from ublkpool.bufpool.memory_room import mib
from ublkpool.daemon.admin.client import Client
from ublkpool.daemon.admin.patience import explain_missing
from ublkpool.daemon.admin.wire import admin_socket
from ublkpool.daemon.doctor.finding import Finding, printable, some
from ublkpool.daemon.errors import DaemonError, RemoteError
from ublkpool.daemon.status import DaemonStatus
from ublkpool.workers.credentials import credentials_of

CHECK = "daemon"
ASK_S = 3.0
_FAILED_MAX, _REASON_MAX = 20, 200
_FULL = 0.9
"""Above this part of the budget little of it is left."""


class DaemonAnswer(msgspec.Struct, frozen=True):
    """What the daemon answered.

    `state`: none listens (absent), a killed one left its socket (dead), this user may not ask (hidden), it answers no
    request (silent) or answers.  `pid` is 0 if it is not known.  `failed`: devices that need a hand, with the reason.
    The other fields are those of `DaemonStatus`.
    """

    state: Literal["absent", "dead", "hidden", "silent", "answers"]
    pid: int = 0
    says: str = ""
    count: int = 0
    failed: tuple[str, ...] = ()
    memory_bytes: int = 0
    memory_max_bytes: int = 0
    prepared: int = 0
    prepared_wanted: int = 0

    @property
    def is_gone(self) -> bool:
        """Whether no daemon serves this run directory now."""
        return self.state in ("absent", "dead")


def ask_daemon(run_dir: Path, patience_s: float = ASK_S) -> DaemonAnswer:
    """Ask for the devices; gives up after `patience_s` seconds without an answer."""
    path = admin_socket(run_dir)
    try:
        pid = _listener(path, patience_s)
    except FileNotFoundError:
        # A daemon still listens on a socket that was removed.
        gone = explain_missing(path)
        return DaemonAnswer("silent", says=printable(gone)) if gone else DaemonAnswer("absent")
    except ConnectionRefusedError:
        return DaemonAnswer("dead")
    except PermissionError:
        return DaemonAnswer("hidden")
    except OSError as error:
        return DaemonAnswer("silent", says=printable(f"{path}: {error.strerror or error}"))
    try:
        client = Client(run_dir)
        devices = client.devices(patience_s)
        daemon = _status(client, patience_s)
    except DaemonError as error:
        return DaemonAnswer("silent", pid, says=printable(str(error)))
    failed = [f"{each.name}: {each.reason}"[:_REASON_MAX] for each in devices if each.state == "failed"]
    return DaemonAnswer(
        "answers",
        pid,
        count=len(devices),
        failed=tuple(failed[:_FAILED_MAX]),
        memory_bytes=daemon.memory_bytes,
        memory_max_bytes=daemon.memory_max_bytes,
        prepared=daemon.prepared,
        prepared_wanted=daemon.prepared_wanted,
    )


def _status(client: Client, patience_s: float) -> DaemonStatus:
    """Of a daemon of an earlier version nothing is known.  Raises `DaemonError`."""
    with suppress(RemoteError):
        return client.daemon(patience_s)
    return DaemonStatus(version="")


def _listener(path: Path, patience_s: float) -> int:
    """The process that listens.  Raises `OSError`."""
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)) as connection:
        connection.settimeout(patience_s)
        connection.connect(str(path))
        with suppress(OSError):
            return credentials_of(connection).pid
    return 0


def daemon_findings(run_dir: Path, answer: DaemonAnswer) -> list[Finding]:
    """Whether a daemon answers, and its devices that have failed."""
    who = f"the daemon of {run_dir}"
    if answer.is_gone:
        return [Finding(CHECK, "ok", f"no daemon runs in {run_dir}")]
    if answer.state == "hidden":
        return [Finding(CHECK, "warn", f"{who} was not asked: permission denied", "sudo ublkpool doctor")]
    if answer.state == "silent":
        way_out = (
            "if it does not come back: ublkpool serve, after the end of its process, goes on with its devices"
        )
        return [Finding(CHECK, "fail", f"{who} does not answer: {answer.says}", way_out)]
    found = [Finding(CHECK, "ok", f"{who}, process {answer.pid}, answers: {answer.count} devices")]
    if answer.failed:
        says = f"devices have failed: {some(answer.failed)}"
        found.append(Finding(CHECK, "fail", says, "ublkpool list; then add the device again, or delete it"))
    if answer.prepared_wanted:
        says = f"{answer.prepared} of {answer.prepared_wanted} prepared devices wait for an add"
        found.append(Finding(CHECK, "ok", says))
    return [*found, *_memory(answer)]


def _memory(answer: DaemonAnswer) -> list[Finding]:
    """How much of the budget of memory the devices have; nothing without a budget."""
    used_bytes, max_bytes = answer.memory_bytes, answer.memory_max_bytes
    if not max_bytes:
        return []
    says = f"the devices have {mib(used_bytes)} of memory, of {mib(max_bytes)} (memory_max)"
    way_out = "delete a device, or raise memory_max in the config, then ublkpool reload"
    if used_bytes > max_bytes:
        return [Finding(CHECK, "warn", f"{says}: all are served, and no device is added", way_out)]
    if used_bytes > max_bytes * _FULL:
        return [Finding(CHECK, "warn", f"{says}: little is left", way_out)]
    return [Finding(CHECK, "ok", says)]
