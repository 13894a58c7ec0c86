"""Facts that a step of the systemd guest writes for the tests on the host, and what the steps share.

Runs in the guest, by the Python in its root, with the installed ublkpool.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ublkpool.daemon.admin.client import AdminClient
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.status import DeviceStatus

FACTS = Path("/root/check/facts")
DEADLINE_S = 600.0
SHOWN = "Id,ActiveState,SubState,Result,StatusText,NRestarts,MainPID,UnitFileState"

client = AdminClient(Path("/run/ublkpool"))


def say(fact: str, value: object) -> None:
    """Write a fact and sync it, so that it survives a crash."""
    with FACTS.open("a") as facts:
        facts.write(json.dumps({"fact": fact, "value": value}) + "\n")
        facts.flush()
        os.fsync(facts.fileno())


def shell(*command: str) -> dict[str, Any]:
    """Run a command; returns its status and output."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return {"status": done.returncode, "said": done.stdout}


def eventually(condition: Callable[[], bool], what: str) -> float:
    """Wait until the condition holds; returns the seconds it took.  Raises `TimeoutError`."""
    began_s = time.monotonic()
    while not condition():
        if time.monotonic() - began_s > DEADLINE_S:
            raise TimeoutError(f"{what}: not after {DEADLINE_S:g} s")
        time.sleep(0.1)
    return time.monotonic() - began_s


def units(*names: str) -> dict[str, dict[str, str]]:
    """The properties of these units."""
    said = str(shell("systemctl", "show", "-p", SHOWN, *names)["said"])
    found = [dict(line.split("=", 1) for line in each.splitlines()) for each in said.split("\n\n")]
    return {each["Id"]: each for each in found}


def device(name: str) -> DeviceStatus | None:
    """A device's status; None while the daemon does not answer or has no device of that name."""
    try:
        return next((each for each in client.devices() if each.name == name), None)
    except DaemonError:
        return None


def is_live(name: str, not_pid: int | None = None) -> bool:
    """Whether the device is live, with a backend other than this pid."""
    found = device(name)
    return (
        found is not None
        and found.state == "live"
        and found.backend.attached
        and found.backend.pid != not_pid
    )


def backend_pid(name: str) -> int:
    """The pid of its backend, 0 without a backend."""
    found = device(name)
    return (found.backend.pid or 0) if found else 0


def writes_go_on(what: str, disk: str = "ublkb0") -> None:
    """Wait until this disk, by default vol0's, has done more writes than can have been in flight before."""
    stat = Path(f"/sys/block/{disk}/stat")

    def writes() -> int:
        return int(stat.read_text().split()[4])

    enough = writes() + 16
    eventually(lambda: writes() >= enough, what)


@contextmanager
def running_fio(fact: str, command: Sequence[str]) -> Iterator["subprocess.Popen[str]"]:
    """Run fio for the length of a block, interrupt it, and write how it ended and what it verified as this fact."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as fio:
        try:
            yield fio
        finally:
            fio.send_signal(signal.SIGINT)
            said, complained = fio.communicate()
    jobs = json.JSONDecoder().raw_decode(said[said.index("{") :])[0]["jobs"]
    say(
        fact,
        {
            "status": fio.returncode,
            "complaints": complained,
            "errors": {each["jobname"]: each["error"] for each in jobs},
            "verified": min(each["read"]["total_ios"] for each in jobs),
        },
    )
