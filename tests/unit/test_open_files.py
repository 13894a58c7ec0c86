"""Whether another process still has a file that was sent to it, as the kernel (and not /proc) tells it."""

import mmap
import os
import signal
import socket
from collections.abc import Iterator

import pytest

from support.vm.process import Forked
from ublkpool.daemon.processes.open_files import is_open_elsewhere, open_memfds, reopened
from ublkpool.ublk.mappings import sealed_memory

SIZE_BYTES = 4096


@pytest.fixture
def memory() -> Iterator[int]:
    fd = sealed_memory(SIZE_BYTES, "test")
    yield fd
    assert not is_open_elsewhere(fd), "nothing is left of the test"
    os.close(fd)


def test_our_own_descriptors_and_mappings_do_not_count(memory: int) -> None:
    copy, mapped = os.dup(memory), mmap.mmap(memory, SIZE_BYTES)
    ours, theirs = socket.socketpair()
    socket.send_fds(ours, [b"x"], [memory])
    assert not is_open_elsewhere(memory)
    for each in (ours, theirs, mapped):
        each.close()
    os.close(copy)


def test_a_sent_descriptor_counts_until_it_is_closed(memory: int) -> None:
    handed = reopened(memory)
    assert is_open_elsewhere(memory)
    copy = os.dup(handed)
    os.close(handed)
    assert is_open_elsewhere(memory)
    os.close(copy)


def test_a_mapping_counts_after_its_descriptor_is_closed(memory: int) -> None:
    handed = reopened(memory)
    # Python's mmap would keep a duplicate of the descriptor.
    with Forked(lambda: _map_and_close(handed)) as holder:
        os.close(handed)
        assert is_open_elsewhere(memory)
        holder.kill()


def _map_and_close(fd: int) -> int:
    mapping = mmap.mmap(fd, SIZE_BYTES)
    os.closerange(3, 64)
    signal.pause()
    return mapping[0]


def test_one_in_flight_that_no_process_shows_counts(memory: int) -> None:
    """The sender has closed the file: /proc shows no descriptor, yet another process can still receive it."""
    handed = reopened(memory)
    ours, theirs = socket.socketpair()
    socket.send_fds(ours, [b"x"], [handed])
    os.close(handed)
    assert list(open_memfds("test")) == [] and is_open_elsewhere(memory)
    ours.close()
    theirs.close()


def _wait() -> int:
    signal.pause()
    return 0


def test_memfds_are_found_by_name_without_a_look_at_what_else_is_open(
    memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look at a file may wait for ever for its file system."""
    with Forked(_wait) as holder:
        listed: list[str] = []
        listdir = os.listdir

        def list_once(path: str) -> list[str]:
            listed.append(path)
            return listdir(path)

        with monkeypatch.context() as watched:
            watched.setattr(os, "listdir", list_once)
            for call in ("stat", "fstat", "lstat", "open"):
                watched.setattr(os, call, None)
            found = list(open_memfds("test"))
            assert list(open_memfds("tes")) == list(open_memfds("test", [holder.pid])) == []
        assert f"/proc/{holder.pid}/fd/{memory}" in map(str, found)
        assert {each.parts[2] for each in found} == {str(holder.pid)}
        assert listed.count(f"/proc/{holder.pid}/fd") == 2, (
            "once for each search that is not told to spare it"
        )
        holder.kill()


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR])
def test_a_file_opened_through_proc_counts(memory: int, flags: int) -> None:
    opened = os.open(f"/proc/{os.getpid()}/fd/{memory}", flags | os.O_CLOEXEC)
    assert is_open_elsewhere(memory)
    os.close(opened)


def test_a_broken_lease_sends_the_daemon_no_signal(memory: int) -> None:
    before = signal.getsignal(signal.SIGIO)
    assert not is_open_elsewhere(memory)
    assert signal.getsignal(signal.SIGIO) is before


def test_a_kernel_that_gives_no_lease_is_no_proof(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> int:
        raise OSError(22, "Invalid argument")

    with monkeypatch.context() as broken:
        broken.setattr("fcntl.fcntl", refuse)
        assert is_open_elsewhere(memory)
