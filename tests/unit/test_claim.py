"""A store is opened exclusively: dead users are waited for, living ones only for a while and named in the error."""

import errno
import fcntl
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from support.fakes.worker import FakeWorker, finish, spawn
from support.loop_devices import loop_device
from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk import claim
from ublkpool.bufpool.sdk import store_users as in_use
from ublkpool.bufpool.wire import Kind, Op

MIB = 1 << 20
DEADLINE_S = 60


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(MIB))
    return path


class Time:
    """A clock that only `sleep` moves."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.waits = 0

    def clock(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.waits += 1
        self.now_s += seconds


def _patience(path: Path, time: Time) -> claim.Patience:
    return claim.Patience(path, time.clock, time.sleep)


@pytest.fixture
def running() -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts Python code and waits for its first line; ends the process after the test."""
    with ExitStack() as ends:

        def start(code: str, *words: object) -> "subprocess.Popen[str]":
            command = [sys.executable, "-c", code, *map(str, words)]
            process = ends.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            ends.callback(process.kill)
            assert process.stdout is not None
            process.stdout.readline()
            return process

        yield start


@pytest.fixture
def locked(image: Path, running: Callable[..., "subprocess.Popen[str]"]) -> "subprocess.Popen[str]":
    """A backend, by its command line, that has the image locked."""
    code = (
        "import fcntl, os, sys, time; file = os.open(sys.argv[1], os.O_RDWR);"
        "fcntl.flock(file, fcntl.LOCK_EX); print(flush=True); time.sleep(600)"
    )
    return running(code, image, "backend", "file", "--device", "vol7")


def test_a_store_that_a_living_process_has_locked_is_refused_with_its_device_and_pid(
    image: Path, locked: "subprocess.Popen[str]"
) -> None:
    time = Time()
    patience = _patience(image, time)
    with pytest.raises(BackendError) as refused:
        while True:
            patience.wait("locked")
    assert str(refused.value).startswith(f"path={image}: locked by process {locked.pid} (")
    assert "the ublkpool backend of vol7" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert claim.LIVE_PATIENCE_S <= time.now_s < claim.LIVE_PATIENCE_S + 1


def test_a_process_is_named_by_its_device_or_its_command() -> None:
    assert (
        in_use._backend_of(["ublkpool", "backend", "file", "--device=vol9"]) == "the ublkpool backend of vol9"
    )
    assert in_use._backend_of(["ublkpool", "backend", "file", "--device"]) == ""
    assert in_use.name_process(os.getpid()).startswith(f"process {os.getpid()} (")
    assert in_use.name_process(1 << 30) == f"process {1 << 30}"


def test_opening_waits_until_a_predecessor_has_let_go(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "LIVE_PATIENCE_S", DEADLINE_S)
    first = claim.open_alone(image, os.O_RDWR)
    done = threading.Event()

    def open_second() -> None:
        os.close(claim.open_alone(image, os.O_RDWR))
        done.set()

    thread = threading.Thread(target=open_second)
    thread.start()
    assert not done.wait(0.1)
    os.close(first)
    assert done.wait(DEADLINE_S)
    thread.join()


@pytest.mark.skipif(
    str(Path("/proc/self/ns/pid").readlink()) != "pid:[4026531836]",
    reason="only the first pid namespace is shown the locks of the dead",
)
def test_the_io_of_a_dead_process_is_waited_for_as_long_as_it_takes(image: Path) -> None:
    """A descriptor in flight between sockets outlives the process that locked it, as io_uring's references do."""
    ours, theirs, holder = *_pair(), os.open(image, os.O_RDWR)
    child = os.fork()
    if child == 0:
        fcntl.flock(holder, fcntl.LOCK_EX)
        _send(theirs, holder)
        os._exit(0)
    os.waitpid(child, 0)
    os.close(holder)
    time = Time()
    patience = _patience(image, time)
    while time.now_s < claim.UNSEEN_PATIENCE_S + claim.LIVE_PATIENCE_S:
        patience.wait("locked")
    os.close(ours)
    os.close(theirs)
    os.close(claim.open_alone(image, os.O_RDWR))


def _pair() -> tuple[int, int]:
    import socket

    ours, theirs = socket.socketpair()
    return ours.detach(), theirs.detach()


def _send(sock: int, file: int) -> None:
    import socket

    with socket.socket(fileno=os.dup(sock)) as connection:
        socket.send_fds(connection, [b"x"], [file])


def test_a_lock_of_a_process_that_is_not_seen_is_waited_for_but_not_for_ever(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_use, "lockers", lambda path: [])
    monkeypatch.setattr(in_use, "openers", lambda path: [])
    time = Time()
    patience = _patience(image, time)
    with pytest.raises(BackendError, match="locked by a process that cannot be seen from here"):
        while True:
            patience.wait("locked")
    assert time.now_s >= claim.UNSEEN_PATIENCE_S


def test_a_process_with_sigkill_pending_is_dying_and_one_that_runs_is_not() -> None:
    assert not in_use.is_dying(os.getpid())
    with subprocess.Popen(["sleep", "600"]) as process:
        assert not in_use.is_dying(process.pid)
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert in_use.is_dying(process.pid), "a zombie"
    assert in_use.is_dying(process.pid), "nothing has this number"


def test_readers_share_a_store_and_a_writer_has_it_alone(image: Path) -> None:
    readers = [claim.open_alone(image, os.O_RDONLY) for _ in range(2)]
    with image.open("rb+") as writer, pytest.raises(BlockingIOError):
        fcntl.flock(writer, fcntl.LOCK_EX | fcntl.LOCK_NB)
    for each in readers:
        os.close(each)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def loop(image: Path) -> Iterator[Path]:
    """A loop device on the image."""
    with loop_device(image) as node:
        yield node


def test_a_block_device_to_be_written_is_claimed_and_one_to_be_read_is_not(loop: Path) -> None:
    file = claim.open_alone(loop, os.O_RDWR)
    with pytest.raises(OSError, match="busy") as busy:
        os.open(loop, os.O_RDONLY | os.O_EXCL)
    assert busy.value.errno == errno.EBUSY
    os.close(file)
    reader = claim.open_alone(loop, os.O_RDONLY)
    os.close(os.open(loop, os.O_RDONLY | os.O_EXCL))
    os.close(reader)


def test_a_mounted_block_device_is_refused_with_its_mount_and_can_be_read(loop: Path, tmp_path: Path) -> None:
    at = tmp_path / "with space"
    at.mkdir()
    _run("mkfs.ext4", "-q", str(loop))
    _run("mount", str(loop), str(at))
    try:
        with pytest.raises(BackendError) as refused:
            claim.open_alone(loop, os.O_RDWR)
        os.close(claim.open_alone(loop, os.O_RDONLY))
    finally:
        _run("umount", str(at))
    assert f"path={loop}: in use: {loop.name} is mounted at {at}" in str(refused.value)
    os.close(claim.open_alone(loop, os.O_RDWR))


@pytest.fixture
def partition(image: Path) -> Iterator[Path]:
    """The one partition of a loop device, by a table as fdisk writes it."""
    start, count = 2048, 2048
    entry = struct.pack("<B3sB3sII", 0, bytes(3), 0x83, bytes(3), start, count)
    image.write_bytes(bytes(446) + entry + bytes(48) + b"\x55\xaa" + bytes(4 * MIB - 512))
    with loop_device(image, "--partscan") as disk:
        part = Path(f"{disk}p1")
        if not part.is_block_device():
            pytest.skip("this machine makes no nodes for partitions")
        yield part


def test_a_disk_is_refused_while_a_partition_of_it_is_used_and_the_other_way_round(
    partition: Path, tmp_path: Path
) -> None:
    disk = Path(str(partition).removesuffix("p1"))
    _run("mkfs.ext4", "-q", str(partition))
    _run("mount", str(partition), str(tmp_path))
    try:
        with pytest.raises(
            BackendError, match=f"path={disk}: in use: {partition.name} is mounted at {tmp_path}"
        ):
            claim.open_alone(disk, os.O_RDWR)
    finally:
        _run("umount", str(tmp_path))
    whole = claim.open_alone(disk, os.O_RDWR)
    with pytest.raises(OSError, match="busy"):
        os.open(partition, os.O_RDWR | os.O_EXCL)
    os.close(whole)


def test_a_block_device_that_swaps_is_refused(loop: Path) -> None:
    _run("mkswap", str(loop))
    try:
        _run("swapon", str(loop))
    except subprocess.CalledProcessError:
        pytest.skip("this machine does not swap")
    try:
        with pytest.raises(BackendError, match=f"{loop.name} is used as swap"):
            claim.open_alone(loop, os.O_RDWR)
    finally:
        _run("swapoff", str(loop))


def test_a_member_of_a_device_mapper_disk_is_refused_with_its_holder(loop: Path) -> None:
    name = f"ublkpool-test-{os.getpid()}"
    try:
        _run("dmsetup", "create", name, "--table", f"0 {MIB // 512} linear {loop} 0")
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("this machine has no device mapper")
    try:
        with pytest.raises(BackendError, match=rf"{loop.name} is held by /dev/dm-\d+"):
            claim.open_alone(loop, os.O_RDWR)
    finally:
        _run("dmsetup", "remove", name)


def test_the_process_that_opened_a_block_device_exclusively_is_named(
    loop: Path, monkeypatch: pytest.MonkeyPatch, running: Callable[..., "subprocess.Popen[str]"]
) -> None:
    monkeypatch.setattr(claim, "LIVE_PATIENCE_S", 0.1)
    code = "import os, sys, time; os.open(sys.argv[1], os.O_RDWR | os.O_EXCL); print(flush=True); time.sleep(600)"
    holder = running(code, loop)
    with pytest.raises(BackendError, match=f"held exclusively by .*process {holder.pid}"):
        claim.open_alone(loop, os.O_RDWR)


def test_a_file_that_a_loop_device_uses_is_refused_under_any_of_its_names(image: Path, loop: Path) -> None:
    other = image.with_name("hard-link")
    other.hardlink_to(image)
    for path in (image, other):
        with pytest.raises(BackendError, match=f"{loop} is set up on it"):
            claim.open_alone(path, os.O_RDWR)
        os.close(claim.open_alone(path, os.O_RDONLY))


@pytest.mark.parametrize("top", ["loop7", "loop7p1", "dm-3"])
def test_whatever_lies_on_a_loop_device_is_in_use_while_the_loop_device_s_file_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, top: str
) -> None:
    """A partition, and a device mapper disk on the partition, of a loop device."""
    loop = tmp_path / "devices/loop7"
    (loop / "loop").mkdir(parents=True)
    (loop / "loop/backing_file").write_text("/x/f.img\n")
    (loop / "loop7p1").mkdir()
    (loop / "loop7p1/partition").write_text("1\n")
    (tmp_path / "devices/dm-3/slaves").mkdir(parents=True)
    (tmp_path / "devices/dm-3/slaves/loop7p1").symlink_to(loop / "loop7p1")
    places = {"loop7": loop, "loop7p1": loop / "loop7p1", "dm-3": tmp_path / "devices/dm-3"}
    about = Path("/dev/null").stat()
    (tmp_path / "numbers").mkdir()
    (tmp_path / "numbers" / f"{os.major(about.st_rdev)}:{os.minor(about.st_rdev)}").symlink_to(places[top])
    (tmp_path / "block").mkdir()
    (tmp_path / "block/loop7").symlink_to(loop)
    monkeypatch.setattr(in_use, "_SYS_DEVICES", tmp_path / "numbers")
    monkeypatch.setattr(in_use, "_SYS_BLOCK", tmp_path / "block")
    monkeypatch.setattr(in_use, "lockers", lambda path: [os.getpid()] if path == Path("/x/f.img") else [])
    found = in_use.lockers_of_loop_files(about.st_rdev)
    assert [each.partition(" (")[0] for each in found] == [
        f"the file /x/f.img of loop7 is locked by process {os.getpid()}"
    ]


def test_a_backend_of_a_block_device_that_is_killed_under_load_is_succeeded(
    loop: Path, tmp_path: Path
) -> None:
    """The kernel keeps a dead process's claim until its last direct I/O has ended, and the successor waits for that."""
    with FakeWorker(tmp_path, depth=8) as worker:
        for turn in range(4):
            backend = spawn(tmp_path, "file", {"path": str(loop), "direct": "on"})
            worker.accept()
            assert worker.read(0, 4096) == bytes([turn]) * 4096
            assert worker.write(0, bytes([turn + 1]) * 4096) == 4096
            writes = [
                worker.describe(Kind.REQUEST, Op.WRITE, (1 + tag) * 65536, 65536, tag=tag) for tag in range(8)
            ]
            worker.send(0, writes)
            backend.kill()
            finish(backend)
            worker.epoch += 1
    os.close(claim.open_alone(loop, os.O_RDWR))


def test_another_file_of_the_same_name_is_not_taken_for_a_loop_devices_file(
    image: Path, loop: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    other = tmp_path / "elsewhere" / image.name
    other.write_bytes(bytes(MIB))
    os.close(claim.open_alone(other, os.O_RDWR))


def test_a_loop_device_whose_file_is_served_is_refused(
    image: Path, loop: Path, locked: "subprocess.Popen[str]"
) -> None:
    with pytest.raises(
        BackendError, match=f"the file {image} of {loop.name} is locked by process {locked.pid}"
    ):
        claim.open_alone(loop, os.O_RDWR)


def test_a_store_on_the_disk_itself_is_refused(loop: Path, tmp_path: Path) -> None:
    at = tmp_path / "at"
    at.mkdir()
    _run("mkfs.ext4", "-q", str(loop))
    _run("mount", str(loop), str(at))
    try:
        inside = at / "inside.img"
        inside.write_bytes(bytes(4096))
        for path in (loop, inside):
            with pytest.raises(BackendError, match=f"path={path}: lies on {loop}, the disk"):
                claim.refuse_own_disk(path, loop)
            claim.refuse_own_disk(path, Path("/dev/ublkb99"))
    finally:
        _run("umount", str(at))
    claim.refuse_own_disk(tmp_path / "none yet", loop)
