"""The events' files: bounded, readable after a kill at any moment, and harmless when the disk is not."""

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ublkpool.daemon.events import event_file
from ublkpool.daemon.events.event import LINE_BYTES_MAX, Event, decode, encode, make_event
from ublkpool.daemon.events.event_file import NAME, OLD_NAME, Append, has_events, load
from ublkpool.daemon.events.kinds import BackendDied

DIED = BackendDied(kind="file", pid=7, was_cut_off=False)
BYTES_MAX = 64 << 10


def event(seq: int, text: str = "gone") -> Event:
    return make_event(seq, 0.0, "vol0", DIED, text, None)


def lines(*seqs: int) -> list[bytes]:
    return [encode(event(seq)) for seq in seqs]


def append(directory: Path, *seqs: int) -> None:
    Append(directory, lines(*seqs), BYTES_MAX)()


def seqs(directory: Path) -> list[int]:
    return [each.seq for each in load(directory, BYTES_MAX)]


def size(directory: Path) -> int:
    return sum(each.stat().st_size for each in directory.iterdir())


def test_what_was_appended_is_loaded(tmp_path: Path) -> None:
    assert seqs(tmp_path) == [] and not has_events(tmp_path) and not has_events(tmp_path / "none")
    append(tmp_path, 1, 2)
    append(tmp_path, 3)
    assert seqs(tmp_path) == [1, 2, 3] and has_events(tmp_path)
    assert (tmp_path / NAME).stat().st_mode & 0o777 == 0o600


def test_the_files_are_bounded_and_have_the_newest_events(tmp_path: Path) -> None:
    rng = random.Random(1)
    seq = 0
    for _ in range(200):
        count = rng.randrange(1, 40)
        append(tmp_path, *range(seq + 1, seq + count + 1))
        seq += count
        assert size(tmp_path) <= BYTES_MAX
        kept = seqs(tmp_path)
        assert kept == list(range(kept[0], seq + 1))
    assert len(kept) > 100 and (tmp_path / OLD_NAME).exists()


def test_a_last_line_that_was_cut_short_is_passed_over_and_removed(tmp_path: Path) -> None:
    whole = b"".join(lines(1, 2))
    for cut in range(len(whole) + 1):
        (tmp_path / NAME).write_bytes(whole[:cut])
        before = seqs(tmp_path)
        assert before == [1, 2][: whole[:cut].count(b"\n")]
        append(tmp_path, 3)
        assert seqs(tmp_path) == [*before, 3]
        assert all(decode(each) for each in (tmp_path / NAME).read_bytes().splitlines())


@pytest.mark.parametrize("what", ["garbage", "binary", "another file's end", "one long line"])
def test_garbage_in_the_file_costs_only_itself(tmp_path: Path, what: str) -> None:
    (one, two), garbage = (
        lines(1, 2),
        {
            "garbage": b"no event\n[]\n{}\n\n",
            "binary": bytes(range(256)) * 4 + b"\n",
            "another file's end": b'"text":"x"}\n',
            "one long line": b"x" * (2 * LINE_BYTES_MAX) + b"\n",
        }[what],
    )
    (tmp_path / NAME).write_bytes(one + garbage + two)
    assert seqs(tmp_path) == [1, 2]
    append(tmp_path, 3)
    assert seqs(tmp_path) == [1, 2, 3]


def test_a_huge_file_is_read_from_its_end(tmp_path: Path) -> None:
    with (tmp_path / NAME).open("wb") as file:
        file.truncate(1 << 40)
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + b"".join(lines(1, 2)))
    assert seqs(tmp_path) == [1, 2]
    append(tmp_path, 3)
    assert seqs(tmp_path) == [1, 2, 3]


def test_an_event_that_was_written_twice_is_shown_once_and_in_order(tmp_path: Path) -> None:
    (tmp_path / OLD_NAME).write_bytes(b"".join(lines(1, 2, 5)))
    (tmp_path / NAME).write_bytes(b"".join(lines(2, 3, 4)))
    assert seqs(tmp_path) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("kind", ["directory", "fifo", "link"])
def test_what_is_no_file_is_neither_read_nor_written(tmp_path: Path, kind: str) -> None:
    path, elsewhere = tmp_path / NAME, tmp_path / "elsewhere"
    elsewhere.write_bytes(b"untouched")
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(elsewhere)
    for call in (lambda: load(tmp_path, BYTES_MAX), lambda: append(tmp_path, 1)):
        with pytest.raises(OSError):
            call()
    assert elsewhere.read_bytes() == b"untouched"


class Killed(BaseException):
    pass


SYSTEM_CALLS = ("open", "fstat", "pread", "ftruncate", "write", "fdatasync")


class Dying:
    """`os`, of whose calls the one of this number kills the process before or after; a write may be cut short."""

    def __init__(self, at: int, half: bool) -> None:
        self._left, self._half = at, half

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in SYSTEM_CALLS:
            return real

        def call(*args: Any) -> Any:
            self._left -= 1
            if self._left == 0:
                if name == "write" and self._half:
                    real(args[0], bytes(args[1])[: len(args[1]) // 2])
                raise Killed
            return real(*args)

        return call


@pytest.mark.parametrize("half", [False, True], ids=["before the call", "in the middle of the write"])
def test_a_kill_at_any_call_leaves_files_that_can_be_read_and_appended_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half: bool
) -> None:
    kills = 0
    for at in range(1, 100):
        directory = tmp_path / str(at)
        directory.mkdir()
        append(directory, 1, 2)
        # So full that this append also puts the older file out.
        with (directory / NAME).open("ab") as file:
            file.write(encode(event(3, "x" * 400)) * 80 + b'{"torn')
        with monkeypatch.context() as patch:
            patch.setattr(event_file, "os", Dying(at, half))
            try:
                append(directory, 4, 5)
            except Killed:
                kills += 1
        kept = seqs(directory)
        assert kept in ([1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4, 5])
        append(directory, 6)
        assert seqs(directory) == [*kept, 6] and size(directory) <= BYTES_MAX
        if kept[-1] == 5 and kills < at:
            break
    assert kills > 8


def failing(real: Callable[..., Any], times: int, code: int, part: bool = False) -> Callable[..., Any]:
    left = [times]

    def write(fd: int, data: memoryview) -> Any:
        if left[0]:
            left[0] -= 1
            if part:
                real(fd, bytes(data)[:5])
            raise OSError(code, os.strerror(code))
        return real(fd, data)

    return write


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_on_a_full_disk_the_older_file_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    (tmp_path / OLD_NAME).write_bytes(b"".join(lines(1)))
    append(tmp_path, 2)
    monkeypatch.setattr("os.write", failing(os.write, 1, code, part=True))
    append(tmp_path, 3)
    assert seqs(tmp_path) == [2, 3] and not (tmp_path / OLD_NAME).exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_write_that_fails_leaves_the_files_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    append(tmp_path, 1)
    before = (tmp_path / NAME).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("os.write", failing(os.write, 9, code, part=True))
        with pytest.raises(OSError) as raised:
            append(tmp_path, 2)
    assert raised.value.errno == code and (tmp_path / NAME).read_bytes() == before
    append(tmp_path, 3)
    assert seqs(tmp_path) == [1, 3]
