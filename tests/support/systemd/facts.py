"""Facts that a step of the systemd guest writes for the tests on the host, and what the steps share.

Runs in the guest, by any Python there: it needs nothing of ours.
"""

import json
import os
import random
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FACTS = Path("/root/check/facts")
DEADLINE_S = 1200.0
PAUSE_MIN_S = 0.1
PAUSE_SHARE = 2
"""How much longer than a look the pause after it is."""
POWEROFF = "ublkpool-check: poweroff"
KNOWN_BYTES = 8 << 20
SHOWN = "Id,ActiveState,SubState,Result,StatusText,NRestarts,MainPID,UnitFileState"


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
    while True:
        look_s = time.monotonic()
        if condition():
            return time.monotonic() - began_s
        now_s = time.monotonic()
        if now_s - began_s > DEADLINE_S:
            raise TimeoutError(f"{what}: not after {DEADLINE_S:g} s")
        # A look may be a command, whose start takes the CPU from what is awaited.
        time.sleep(max(PAUSE_MIN_S, PAUSE_SHARE * (now_s - look_s)))


def units(*names: str, command: Callable[..., dict[str, Any]] = shell) -> dict[str, dict[str, str]]:
    """The properties of these units; `command` runs another user's systemctl."""
    said = str(command("systemctl", "show", "-p", SHOWN, *names)["said"])
    found = [dict(line.split("=", 1) for line in each.splitlines()) for each in said.split("\n\n")]
    return {each["Id"]: each for each in found}


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


def fio_in(directory: Path, rate: str = "200k") -> tuple[str, ...]:
    """fio, which writes in the directory until it is interrupted, each block once, and verifies along the way.

    `rate`: bytes a second, which cost the guest time.
    """
    return (
        *("fio", "--name=check", f"--directory={directory}", "--ioengine=libaio", "--direct=1"),
        *("--rw=randwrite", "--bs=4k", "--iodepth=8", "--size=32M", f"--rate={rate}", "--time_based"),
        *("--runtime=3600", "--verify=crc32c", "--verify_backlog=16", "--output-format=json"),
    )


def write_known(file: Path, seed: int) -> None:
    """Write a file whose content is known on both sides of a boot, and leave it dirty in the page cache."""
    file.write_bytes(random.Random(seed).randbytes(KNOWN_BYTES))


def is_known(file: Path, seed: int) -> bool:
    """Whether the file has the content that was written."""
    return file.read_bytes() == random.Random(seed).randbytes(KNOWN_BYTES)


def run_steps(steps: Iterable[Callable[[], None]]) -> None:
    """Run all steps of one boot; the traceback of a step that fails is a fact."""
    try:
        for step in steps:
            began_s = time.monotonic()
            try:
                step()
            except Exception:
                say(f"broke {step.__name__}", traceback.format_exc())
            say(f"seconds {step.__name__}", round(time.monotonic() - began_s, 1))
    finally:
        # The unit of the script powers off when the script ends.
        Path("/dev/kmsg").write_text(f"{POWEROFF}\n")
