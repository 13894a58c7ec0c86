"""Replaces the program `kublk` of the kernel's selftests: maps its commands to requests to a running ublkpool.

`kublk_server.py` runs it in a fork for each call.  It sends the admin requests of `ublkpool add`, `del` and `list`, and
prints what kublk prints.  KUBLK_RUN_DIR is the daemon's run directory, KUBLK_STATE a directory of the shim: file NUMBER
is its record of the device with that number, `features` the output of `ublkpool features`, DELAY and SLOW_WRITES the
paths of backends that delay answers, PYTHON the interpreter that has ublkpool.  KUBLK_SYS_BLOCK stands in for
/sys/block in this module's own tests.

The shim hides three differences.  A device of kublk waits QUIESCED for `kublk recover`, while ublkpool recovers by
itself: the shim reports QUIESCED from the next epoch on, until `recover` is called.  kublk has a target that stripes
over files: the shim uses memory of the same size.  `kublk add` returns when the disk exists, `ublkpool add` after the
partition scan: for a slow disk the shim adds the device without a backend, starts the backend itself, and returns when
the disk exists.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

Options = dict[str, str]

RUN_DIR, STATE = os.environ.get("KUBLK_RUN_DIR", ""), os.environ.get("KUBLK_STATE", "")
NULL_BYTES = 250 << 30
FAULT_BYTES = 64 << 20
DEADLINE_S = 600.0
NEW_WORKERS_PAUSE_S = 0.005
DISK_PAUSE_S = 0.1
SCAN_PATIENCE_MS = 10_000.0
"""For a disk with a longer delay per request, the shim does not wait for the partition scan."""
IO_TIMEOUT_MS = "1000"
"""The request timeout that the daemon sets, so that a dead worker's requests end soon."""
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
# Options on how a server fetches and copies have no effect that a client can see.
NOT_OFFERED = ("ZERO_COPY", "AUTO_BUF_REG", "PER_IO_DAEMON")


class Refused(Exception):
    """The daemon's error line."""


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
    """The options, and the other arguments."""
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
    """The shim's record of a device; raises `Refused`."""
    try:
        found: dict[str, Any] = json.loads(Path(STATE, number).read_text())
        return found
    except FileNotFoundError:
        raise Refused(f"no device {number}") from None


def note(number: str, **fields: Any) -> None:
    Path(STATE, number).write_text(json.dumps(fields))


def status_of(name: str) -> dict[str, Any] | None:
    """The device's status, None if it does not exist."""
    return next((each for each in ask("list") if each["name"] == name), None)


def backend(options: Options, files: Sequence[str]) -> tuple[str, Options, int | None]:
    """The backend that matches this target, its options, and the disk's size if the backend has none."""
    kind = options.get("-t", "null")
    if kind == "null":
        return "null", {}, NULL_BYTES
    if kind == "loop":
        return "file", {"path": files[0]}, None
    if kind == "stripe":
        size = sum(Path(each).stat().st_size for each in files)
        return "memory", {"size": str(size), "keep": "off"}, None
    if kind in ("fault_inject", "slow_writes"):
        path = Path(STATE, "DELAY" if kind == "fault_inject" else "SLOW_WRITES").read_text()
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
    """Start the backend; returns its pid.  It lives until the device is deleted."""
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
    """Wait until the daemon has set the block layer's timer; raises `Refused` after the deadline.

    The daemon sets it without waiting, and in older drivers the write blocks until every request of the disk is done.
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
    """The device's state in kublk's words."""
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
    """Let the device recover, and kill its new workers as soon as they exist."""
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
    # A backend that delays its answers would delay the disk's removal.
    if device.get("server"):
        kill({device["server"]})
    # A stopped device no longer exists.
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
