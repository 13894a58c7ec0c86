"""What the kernel's selftests call `kublk`, on a running ublkpool: each of its commands is one of ours.

Run by a bare interpreter, since a selftest calls it dozens of times and every import costs.  It says to the admin
socket what `ublkpool add`, `del` and `list` say, and prints what kublk prints.  KUBLK_RUN_DIR is the daemon's run
directory, KUBLK_STATE a directory of the shim's own: NUMBER is what it knows of the device with that number, `features`
what `ublkpool features` says, DELAY the path of the backend that takes its time, PYTHON the interpreter that has
ublkpool.  KUBLK_SYS_BLOCK stands in for /sys/block in this program's own tests.

Three things differ and are made to look the same.  kublk's device waits, QUIESCED, for `kublk recover`; ublkpool's is
recovered by itself: here it counts as QUIESCED from its next epoch on, until `recover` was called.  And kublk has a
target that stripes over files: here that is memory of the same size.  And `kublk add` answers when the disk is there,
ublkpool's when its partitions are read as well: for a disk that takes long to read the shim adds the device without a
backend, starts the backend itself, and answers when the disk is there.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    Options = dict[str, str]

RUN_DIR, STATE = os.environ.get("KUBLK_RUN_DIR", ""), os.environ.get("KUBLK_STATE", "")
NULL_BYTES = 250 << 30
FAULT_BYTES = 64 << 20
DEADLINE_S = 100.0
NEW_WORKERS_PAUSE_S = 0.005
DISK_PAUSE_S = 0.1
SCAN_PATIENCE_MS = 10_000.0
"""A disk that takes longer for a request is not waited for until its partitions are read."""
IO_TIMEOUT_MS = "1000"
"""What the daemon sets, for a dead worker's requests to end soon."""
SYS_BLOCK = Path(os.environ.get("KUBLK_SYS_BLOCK", "/sys/block"))
WITH_VALUE = {
    *(
        "-t",
        "-q",
        "-d",
        "-n",
        "-r",
        "-i",
        "-e",
        "--nthreads",
        "--delay_us",
        "--die_during_fetch",
        "-s",
        "--size",
    ),
}
# How a server fetches and whether it copies is its own business: no client can tell.
NOT_OFFERED = ("ZERO_COPY", "AUTO_BUF_REG", "PER_IO_DAEMON")


class Refused(Exception):
    """The daemon's one line."""


def ask(op: str, **fields: Any) -> Any:
    """The daemon's answer; raises `Refused`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(f"{RUN_DIR}/admin.sock")
        connection.sendall(json.dumps({"v": 1, "op": op, **fields}).encode() + b"\n")
        for line in connection.makefile("rb"):
            answer = json.loads(line)
            if answer.get("ok") is not None:
                break
        else:
            raise Refused("the daemon hung up")
    if not answer["ok"]:
        raise Refused(answer["error"])
    return answer["result"]


def parse(words: Sequence[str]) -> tuple[Options, list[str]]:
    """The options and what is none."""
    options: Options = {}
    files = []
    left = iter(words)
    for word in left:
        if not word.startswith("-"):
            files.append(str(Path(word).absolute()))
        else:
            options[word] = next(left) if word in WITH_VALUE else "1"
    return options, files


def known(number: str) -> dict[str, Any]:
    """What the shim has noted of a device; raises `Refused`."""
    try:
        found: dict[str, Any] = json.loads(Path(STATE, number).read_text())
        return found
    except FileNotFoundError:
        raise Refused(f"no device {number}") from None


def note(number: str, **fields: Any) -> None:
    Path(STATE, number).write_text(json.dumps(fields))


def status_of(name: str) -> dict[str, Any] | None:
    """What `list` says of a device, None if it is not there."""
    return next((each for each in ask("list") if each["name"] == name), None)


def backend(options: Options, files: Sequence[str]) -> tuple[str, Options, int | None]:
    """Which of our backends does what this target does, its options, and the disk's size where it is the disk's own."""
    kind = options.get("-t", "null")
    if kind == "null":
        return "null", {}, NULL_BYTES
    if kind == "loop":
        return "file", {"path": files[0]}, None
    if kind == "stripe":
        size = sum(Path(each).stat().st_size for each in files)
        return "memory", {"size": str(size), "keep": "off"}, None
    if kind == "fault_inject":
        path = Path(STATE, "DELAY").read_text()
        delay_ms = int(options.get("--delay_us", "0")) / 1000
        return path, {"size": str(FAULT_BYTES), "delay_ms": str(delay_ms)}, None
    raise Refused(f"no target {kind}")


def recovery(options: Options) -> str:
    if options.get("-r") != "1":
        return "none"
    return "reissue" if options.get("-i") == "1" else "fail" if options.get("-e") == "1" else "abort"


def add(options: Options, files: list[str]) -> int:
    kind, told, size = backend(options, files)
    name = f"selftest-{os.getpid()}"
    device: dict[str, Any] = {
        "name": name,
        "queues": int(options.get("-q", "2")),
        "depth": int(options.get("-d", "128")),
        "need_get_data": "-g" in options,
        "recovery": recovery(options),
        "partitions": "--no_auto_part_scan" not in options,
        "backend": {"kind": kind, "options": told, "cwd": "/"},
    }
    if size is not None:
        device["size_bytes"] = size
    if float(told.get("delay_ms", "0")) < SCAN_PATIENCE_MS:
        status = ask("add", device=device)
        await_timer(status["id"])
        server = None
    else:
        del device["backend"]
        device["size_bytes"] = int(told["size"])
        ask("add", device=device)
        server = start_backend(kind, name, told)
        status = await_disk(name)
    number = str(status["id"])
    note(number, name=name, epoch=status["epoch"], server=server)
    show(number, status, "LIVE")
    return 0


def start_backend(kind: str, name: str, options: Options) -> int:
    """Its pid.  It outlives the shim, until the device goes."""
    command = [Path(STATE, "PYTHON").read_text(), "-m", "ublkpool.daemon", "backend", kind]
    told = [f"{key}={value}" for key, value in options.items()]
    process = subprocess.Popen(
        [*command, "--device", name, "--run-dir", RUN_DIR, "--", *told],
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    return process.pid


def await_disk(name: str) -> dict[str, Any]:
    """The device's status when the kernel has its disk; raises `Refused` if that takes too long."""
    until_s = time.monotonic() + DEADLINE_S
    while time.monotonic() < until_s:
        status = status_of(name)
        if status is not None and status["workers"] and has_disk(status):
            return status
        time.sleep(DISK_PAUSE_S)
    raise Refused(f"{name}: no disk after {DEADLINE_S:.0f} s")


def await_timer(number: int) -> None:
    """Return when the daemon has set the block layer's timer; raises `Refused` if that takes too long.

    The daemon does not wait for that write, and older drivers let it wait for every request of the disk.
    """
    setting = SYS_BLOCK / f"ublkb{number}" / "queue" / "io_timeout"
    until_s = time.monotonic() + DEADLINE_S
    while setting.read_text().strip() != IO_TIMEOUT_MS:
        if time.monotonic() > until_s:
            raise Refused(f"{setting} is not {IO_TIMEOUT_MS} after {DEADLINE_S:.0f} s")
        time.sleep(DISK_PAUSE_S)


def has_disk(status: dict[str, Any]) -> bool:
    return status["id"] is not None and (SYS_BLOCK / f"ublkb{status['id']}").exists()


def show(number: str, status: dict[str, Any] | None, state: str) -> None:
    workers = status["workers"] if status else []
    pid = workers[0]["pid"] if workers else -1
    size = (status["size_bytes"] or 0) // 512 if status else 0
    queues, depth = (status["queues"], status["depth"]) if status else (0, 0)
    print(f"dev id {number}: nr_hw_queues {queues} queue_depth {depth} block size 512 dev_capacity {size}")
    print(f"\tmax rq size 524288 daemon pid {pid} flags 0x0 state {state}", flush=True)


def list_one(options: Options, _files: list[str]) -> int:
    number = options["-n"]
    device = known(number)
    status = status_of(device["name"])
    show(number, status, state_of(device, status))
    return 0


def state_of(device: dict[str, Any], status: dict[str, Any] | None) -> str:
    """In the words of kublk."""
    if (
        status is None
        or status["state"] == "failed"
        or (status["state"] == "waiting" and not has_disk(status))
    ):
        return "DEAD"
    is_new = status["epoch"] > device["epoch"]
    return "LIVE" if status["state"] in ("live", "waiting") and not is_new else "QUIESCED"


def recover(options: Options, _files: list[str]) -> int:
    number = options["-n"]
    device = known(number)
    if "--die_during_fetch" in options:
        die_in_a_recovery(device["name"])
        return 128 + signal.SIGKILL
    status = ask("wait", name=device["name"], timeout_s=DEADLINE_S)
    note(number, **{**device, "epoch": status["epoch"]})
    show(number, status, "LIVE")
    return 0


def die_in_a_recovery(name: str) -> None:
    """Have the device recover, and kill the workers that come for it as soon as they are there."""
    before = pids(ask("wait", name=name, timeout_s=DEADLINE_S))
    kill(before)
    until_s = time.monotonic() + DEADLINE_S
    while not (new := pids(status_of(name)) - before):
        if time.monotonic() > until_s:
            raise Refused(f"{name}: no worker after those that were killed")
        time.sleep(NEW_WORKERS_PAUSE_S)
    kill(new)


def pids(status: dict[str, Any] | None) -> set[int]:
    return {each["pid"] for each in status["workers"]} if status else set()


def kill(which: set[int]) -> None:
    for pid in which:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def stop(options: Options, _files: list[str]) -> int:
    number = options["-n"]
    ask("del", names=[known(number)["name"]], force="--safe" not in options)
    note(number, name="", epoch=0)
    return 0


def delete(options: Options, _files: list[str]) -> int:
    number = options["-n"]
    device = known(number)
    Path(STATE, number).unlink()
    # A backend that still delays its answer would hold the disk's removal up for as long.
    if device.get("server"):
        kill({device["server"]})
    # One that was stopped is gone already.
    if device["name"]:
        ask("del", names=[device["name"]], force=True)
    return 0


def features(_options: Options, _files: list[str]) -> int:
    for name in Path(STATE, "features").read_text().split():
        if not any(each in name for each in NOT_OFFERED):
            print(f"unknown {name}" if name.startswith("BIT_") else f"UBLK_F_{name}")
    return 0


COMMANDS: dict[str, Callable[[Options, list[str]], int]] = {
    "add": add,
    "list": list_one,
    "recover": recover,
    "stop": stop,
    "del": delete,
    "features": features,
}


def main(words: list[str]) -> int:
    options, files = parse(words[1:])
    try:
        return COMMANDS[words[0]](options, files)
    except (Refused, OSError, KeyError) as error:
        print(f"kublk: {' '.join(words)}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
