"""The watch finds each kind of call that a disk can block, on the loop and in a worker, and no other calls."""

import os
import subprocess
import sys

import pytest

import ublkpool
from support.fakes.watched_calls import MARK, is_on_a_disk, is_own

_PROGRAM = """
import asyncio, os, sys
from pathlib import Path
from support.fakes.watched_calls import is_own, print_with_stack, watch
from ublkpool.daemon.kernel.control_process import ControlRunner
from ublkpool.workers.process import fork_child

def call(name, path):
    calls = {
        "open": lambda: os.open(path, os.O_RDONLY),
        "stat": lambda: os.stat(path),
        "exists": lambda: Path(path).exists(),
        "list": lambda: os.listdir(path),
        "read": lambda: Path(path).read_text(),
        "link": lambda: os.readlink(path),
        "glob": lambda: list(Path(path).glob("*")),
    }
    try:
        calls[name]()
    except OSError:
        pass

name, path, where = sys.argv[1:]
watch(lambda each: is_own(each, ("/run/ours",)), print_with_stack)
if where == "before":
    call(name, path)
elif where == "helper":
    asyncio.run(ControlRunner().look("a", "b", lambda: call(name, path), type(None)))
elif where == "loop":
    async def run():
        call(name, path)
    asyncio.run(run())
else:
    os.waitpid(fork_child(lambda: call(name, path) or 0, [], where), 0)
"""


def said(name: str, path: str, where: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, name, path, where],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stderr


@pytest.mark.parametrize("name", ["open", "stat", "exists", "list", "read", "link", "glob"])
def test_each_kind_of_call_is_found_on_the_loop(name: str) -> None:
    assert f"{MARK}" in said(name, "/sys/block/ublkb0", "loop")


@pytest.mark.parametrize(
    ("where", "found"),
    [("loop", True), ("before", False), ("helper", False), ("ublkpool-0.1", True), ("ublkpool-broker", True)],
)
def test_only_helpers_may_make_such_calls_once_the_daemon_serves(where: str, found: bool) -> None:
    assert (MARK in said("open", "/dev/ublkb0", where)) is found


@pytest.mark.parametrize(
    "path",
    [
        "/dev/ublkb0",
        "/dev/ublkb12p3",
        "/dev/mapper/x",
        "/sys/block/ublkb0/queue/io_timeout",
        "/sys/dev/block/259:0",
        "/proc/1/fd",
        "/proc/77/mountinfo",
        "/proc/77/maps",
    ],
)
def test_paths_that_a_disk_can_block_are_recognized(path: str) -> None:
    assert is_on_a_disk(path) and not is_own(path, ("/",))


@pytest.mark.parametrize(
    "path", ["/dev/ublkc0", "/dev/shm/x", "/run/ours/lock", "/run", "/", "/proc/77/stat", ublkpool.__file__]
)
def test_the_daemons_own_paths_are_allowed(path: str) -> None:
    assert is_own(path, ("/run/ours",))


def test_a_users_path_does_not_belong_to_the_daemon() -> None:
    assert not is_own("/srv/disk.img", ("/run/ours",)) and not is_own("/home/x", ())
    assert not is_on_a_disk(f"/proc/{os.getpid()}/fd")
