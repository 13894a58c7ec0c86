"""What is mounted where, with paths of any bytes, and the processes whose names are any bytes."""

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ublkpool.bufpool.mountinfo import Mount, parse_mounts, read_mounts, read_swaps, shown
from ublkpool.bufpool.sdk import store_users
from ublkpool.daemon.processes import children, left_behind

ODD = "/mnt/\N{NO-BREAK SPACE}\N{LINE SEPARATOR}\x0b\x0c\r\x1c\x85".encode() + b"\xff"
"""What the kernel leaves as it is, and Python takes for the end of a word or a line, or for no text."""
_PR_SET_NAME = 15


@pytest.fixture(params=[b"\xff\rUid:\t77", b"\xff\rSigPnd:\t100"], ids=["user", "signal"])
def odd_process(request: pytest.FixtureRequest) -> Iterator[int]:
    """A process with a name that is no text, and has what text takes for another line."""
    reader, writer = os.pipe()
    ready, said = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writer)
        ctypes.CDLL(None).prctl(_PR_SET_NAME, request.param, 0, 0, 0)
        os.write(said, b"x")
        os.read(reader, 1)
        os._exit(0)
    os.close(reader)
    os.read(ready, 1)
    yield pid
    for each in (writer, ready, said):
        os.close(each)
    os.waitpid(pid, 0)


def test_a_path_may_have_any_bytes(tmp_path: Path) -> None:
    (tmp_path / "mountinfo").write_bytes(
        b"21 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
        b"22 21 259:0 / " + ODD + rb"\040x rw shared:3 - ext4 /dev/" + ODD + b" rw\n"
        b"23 21 0:44 / /mnt/a rw - tmpfs  rw\n"
    )
    assert read_mounts(tmp_path / "mountinfo") == [
        Mount(21, 1, "8:1", "/", "/dev/sda1"),
        Mount(22, 21, "259:0", os.fsdecode(ODD + b" x"), os.fsdecode(b"/dev/" + ODD)),
        Mount(23, 21, "0:44", "/mnt/a", ""),
    ]
    assert shown(os.fsdecode(ODD + b"\nx")) == "/mnt/" + 7 * "?" + "\N{REPLACEMENT CHARACTER}?x"


def test_a_swap_file_may_have_any_bytes(tmp_path: Path) -> None:
    heading = b"Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
    rest = b"\t\tfile\t\t1024\t\t0\t\t-2\n"
    (tmp_path / "swaps").write_bytes(heading + ODD + rb"\040x" + rest + b"/dev/sda2      " + rest)
    assert read_swaps(tmp_path / "swaps") == [os.fsdecode(ODD + b" x"), "/dev/sda2"]


def test_the_mounts_of_this_machine_begin_with_the_root() -> None:
    assert any(each.path == "/" for each in read_mounts())
    assert list(parse_mounts("")) == []


def test_a_process_may_have_any_name(odd_process: int) -> None:
    assert not children.has_ended(odd_process)
    assert (
        left_behind.identify("worker", odd_process) == left_behind.identify("worker", odd_process) is not None
    )
    assert left_behind.user_of(odd_process) == os.geteuid()
    assert not store_users.is_dying(odd_process)
