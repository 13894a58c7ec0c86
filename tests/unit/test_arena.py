"""The pool's memory: allocated at once, laid out as documented, and removed completely."""

import ctypes
import fcntl
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import posix_ipc
import pytest

from support.fakes.descriptors import open_descriptors
from ublkpool.bufpool.errors import PoolError
from ublkpool.bufpool.huge_pages import SharedMap
from ublkpool.bufpool.pool.arena import Arena, arena_prefix, list_orphans, unlink_arena
from ublkpool.bufpool.pool.control import (
    Control,
    ControlHeader,
    Limits,
    SlotHeader,
    control_bytes,
    slot_header_offset,
    stats_offset,
)
from ublkpool.bufpool.pool.lease import Owner
from ublkpool.bufpool.pool.limits import Geometry
from ublkpool.bufpool.pool.memory import make_data
from ublkpool.ublk import _native

INSTANCE = f"test-arena-{os.getpid()}"
GEOMETRY = Geometry.build([(4096, 6), (65536, 3)])
RESERVE = (2, 1)


@pytest.fixture
def prefix() -> Iterator[str]:
    yield arena_prefix(INSTANCE, 7)
    left = list_orphans(INSTANCE)
    for each in left:
        unlink_arena(each)
    assert left == []


@pytest.fixture
def arena(prefix: str) -> Iterator[Arena]:
    with Arena.create(prefix, GEOMETRY, queues=2, device_number=7, reserve=RESERVE) as arena:
        yield arena
        arena.unlink()


def objects() -> list[str]:
    return sorted(path.name for path in Path("/dev/shm").iterdir() if INSTANCE in path.name)


def test_the_control_segment_has_the_documented_layout(arena: Arena) -> None:
    raw = os.pread(arena.control_fd, 1 << 20, 0)
    assert raw[:8] == b"UBLKPOOL"
    assert struct.unpack_from("<IIIIIIQ", raw, 8) == (1, 7, 2, 2, 9, 0, 6 * 4096 + 3 * 65536)
    assert struct.unpack_from("<QIIIIQ", raw, 64) == (0, 4096, 6, 0, 2, 0)
    assert struct.unpack_from("<QIIIIQ", raw, 96) == (6 * 4096, 65536, 3, 6, 1, 0)
    assert not any(raw[128:])
    assert len(raw) == 4096 * (1 + 2 + 1)


def test_limits_lie_where_earlier_versions_left_zeros_and_each_change_has_a_new_generation(
    arena: Arena,
) -> None:
    assert arena.control.limits == Limits()
    os.pwrite(arena.control_fd, struct.pack("<QQ", 11, 12), 1088)
    arena.control.set_limits(Limits(5, 6, 7))
    arena.control.set_limits(Limits(500, 100 << 20, 10**8))
    raw = os.pread(arena.control_fd, 4096, 0)
    assert struct.unpack_from("<QQQQ", raw, 1024) == (2, 500, 100 << 20, 10**8)
    assert struct.unpack_from("<QQ", raw, 1088) == (11, 12), "the workers' words stay"
    assert arena.control.limits == Limits(500, 100 << 20, 10**8)


def test_the_core_reads_the_limits_where_they_are_written() -> None:
    names = [name for name, _ in _native.ffi.typeof("struct uq_limits").fields]
    at = {name: _native.ffi.offsetof("struct uq_limits", name) for name in names}
    assert (at["generation"], at["per_s"], at["burst_ns"], at["paid_until"]) == (0, 8, 24, 64)


def test_slot_headers_and_statistics_have_the_documented_layout(arena: Arena) -> None:
    arena.control.grant(3, Owner(1, 5))
    assert os.pread(arena.control_fd, 16, 4096 * 3 + 16 * 3) == struct.pack("<IIII", 2, 5, 0, 1)
    assert slot_header_offset(2, 3) == 4096 * 3 + 48
    os.pwrite(arena.control_fd, b"worker", 4096 * 2)
    assert arena.control.statistics_block(1)[:8] == b"worker\0\0"
    assert stats_offset(1) == 8192
    with pytest.raises(PoolError, match="queue 2 is none"):
        arena.control.statistics_block(2)
    with pytest.raises(PoolError, match="slot 9 is none"):
        arena.control.grant(9, Owner(0, 0))


def test_a_grant_raises_the_sequence_and_a_release_leaves_it(arena: Arena) -> None:
    control = arena.control
    control.grant(8, Owner(0, 4))
    os.pwrite(arena.control_fd, struct.pack("<I", 12), slot_header_offset(2, 8) + 8)
    assert control.slot_header(8) == SlotHeader(owner=1, epoch=4, tag=12, sequence=1)
    control.release(8)
    assert control.slot_header(8) == SlotHeader(owner=0, epoch=4, tag=0, sequence=1)
    os.pwrite(arena.control_fd, struct.pack("<I", 13), slot_header_offset(2, 8) + 8)
    control.grant(8, Owner(1, 5))
    assert control.slot_header(8) == SlotHeader(owner=2, epoch=5, tag=0, sequence=2)


def test_the_sequence_wraps(arena: Arena) -> None:
    os.pwrite(arena.control_fd, b"\xff" * 4, slot_header_offset(2, 0) + 12)
    arena.control.grant(0, Owner(0, 0))
    assert arena.control.slot_header(0).sequence == 0


def test_another_process_reads_the_slots_owners(arena: Arena, prefix: str) -> None:
    arena.control.grant(0, Owner(0, 4))
    with Arena.open(prefix, arena.data_fd) as other:
        assert list(other.control.slot_owners()) == [Owner(0, 4)] + [None] * 8
        assert (other.geometry, other.reserve) == (GEOMETRY, RESERVE)
        assert (other.queues, other.device_number) == (2, 7)


def test_memory_is_allocated_up_front(arena: Arena) -> None:
    data, control = os.fstat(arena.data_fd), os.fstat(arena.control_fd)
    assert (data.st_size, control.st_size) == (GEOMETRY.total_bytes, control_bytes(2, 9))
    assert 512 * (data.st_blocks + control.st_blocks) == data.st_size + control.st_size


def test_every_page_is_there_before_the_first_use(arena: Arena) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    for fd in (arena.data_fd, arena.control_fd):
        size_bytes = os.fstat(fd).st_size
        resident = (ctypes.c_ubyte * (size_bytes // 4096))()
        with mmap.mmap(fd, size_bytes) as mapping:
            address = (ctypes.c_ubyte * size_bytes).from_buffer(mapping)
            assert libc.mincore(ctypes.byref(address), ctypes.c_size_t(size_bytes), resident) == 0
            del address
        assert all(each & 1 for each in resident)


def test_descriptors_are_private_and_close_on_exec(arena: Arena, prefix: str) -> None:
    with Arena.open(prefix, arena.data_fd) as other:
        for each in (arena, other):
            for fd in (each.data_fd, each.control_fd):
                assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
            assert os.fstat(each.control_fd).st_mode & 0o777 == 0o600


def test_closing_leaves_no_descriptor_and_may_be_repeated(prefix: str) -> None:
    before = open_descriptors()
    arena = Arena.create(prefix, GEOMETRY, 2, 7, RESERVE)
    arena.unlink()
    arena.close()
    arena.close()
    assert open_descriptors() == before


def test_a_second_pool_of_the_same_name_is_refused_and_the_first_one_stays(arena: Arena, prefix: str) -> None:
    with pytest.raises(PoolError, match=r"7-ctl exists already"):
        Arena.create(prefix, GEOMETRY, 2, 7, RESERVE)
    assert len(objects()) == 1


def test_a_leftover_control_object_fails_the_creation_without_removing_it(prefix: str) -> None:
    fd = posix_ipc.SharedMemory(f"{prefix}-ctl", posix_ipc.O_CREX).fd
    os.close(fd)
    with pytest.raises(PoolError, match=r"7-ctl exists already"):
        Arena.create(prefix, GEOMETRY, 2, 7, RESERVE)
    assert objects() == [f"{prefix[1:]}-ctl"]
    assert list_orphans(INSTANCE) == [prefix]
    unlink_arena(prefix)


def test_a_pool_larger_than_the_available_memory_is_refused_and_leaves_nothing(prefix: str) -> None:
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    count = int(meminfo["MemTotal"].split()[0]) // 1024 + 1
    before = open_descriptors()
    with pytest.raises(
        PoolError,
        match=r"the pool of device 7 needs [\d.]+ MiB of memory and [\d.]+ MiB are available \(.*\): lower .*pool$",
    ):
        Arena.create(prefix, Geometry.build([(1 << 20, count)]), 1, 7, (1,))
    assert objects() == []
    assert open_descriptors() == before


@pytest.mark.parametrize("by_bytes", [-4096, 4096])
def test_no_process_with_a_descriptor_can_change_the_size_of_a_pool(arena: Arena, by_bytes: int) -> None:
    """A missing page would mean SIGBUS in a worker, or a request that never ends in the kernel."""
    theirs = os.open(f"/proc/self/fd/{arena.data_fd}", os.O_RDWR | os.O_CLOEXEC)
    try:
        with pytest.raises(PermissionError):
            os.ftruncate(theirs, GEOMETRY.total_bytes + by_bytes)
        with pytest.raises(PermissionError):
            os.posix_fallocate(theirs, GEOMETRY.total_bytes, 4096)
        with pytest.raises(PermissionError):
            fcntl.fcntl(theirs, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    finally:
        os.close(theirs)
    assert arena.is_sealed and os.fstat(arena.data_fd).st_size == GEOMETRY.total_bytes


def test_a_hole_that_is_punched_into_a_pool_reads_as_zeros_and_takes_data_again(arena: Arena) -> None:
    theirs = os.open(f"/proc/self/fd/{arena.data_fd}", os.O_RDWR | os.O_CLOEXEC)
    with SharedMap(arena.data_fd, GEOMETRY.total_bytes) as ours:
        ours.view[:4] = b"data"
        _punch(theirs, GEOMETRY.total_bytes)
        assert bytes(ours.view[:4]) == bytes(4)
        ours.view[:4] = b"more"
        assert os.pread(theirs, 4, 0) == b"more"
    os.close(theirs)


def _punch(fd: int, size_bytes: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    keep_size, punch_hole = 1, 2
    mode = keep_size | punch_hole
    assert libc.fallocate(fd, mode, ctypes.c_long(0), ctypes.c_long(size_bytes)) == 0


def test_a_pools_memory_can_be_replaced(arena: Arena) -> None:
    os.pwrite(arena.data_fd, b"old", 0)
    count = len(open_descriptors())
    arena.replace_data(make_data(*arena.next_data))
    assert len(open_descriptors()) == count
    assert arena.is_sealed and os.pread(arena.data_fd, 3, 0) == bytes(3)
    with pytest.raises(PoolError, match="has 4096 bytes"):
        arena.replace_data(make_data("too small", 4096, "off"))
    assert len(open_descriptors()) == count


def test_a_pool_of_an_earlier_version_has_a_name_for_its_data_and_is_used_as_it_is(
    arena: Arena, prefix: str
) -> None:
    data = posix_ipc.SharedMemory(f"{prefix}-data", posix_ipc.O_CREX, mode=0o600).fd
    os.ftruncate(data, GEOMETRY.total_bytes)
    os.pwrite(data, b"what is in flight", 0)
    os.close(data)
    with Arena.open(prefix) as old:
        assert not old.is_sealed and os.pread(old.data_fd, 17, 0) == b"what is in flight"
        old.replace_data(make_data(*old.next_data))
        assert old.is_sealed
        old.unlink()
    assert objects() == []


def test_space_that_runs_out_half_way_leaves_nothing(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    allocate = os.posix_fallocate

    def without_control(fd: int, offset: int, size_bytes: int) -> None:
        if size_bytes == control_bytes(2, 9):
            raise OSError(28, "No space left on device")
        allocate(fd, offset, size_bytes)

    monkeypatch.setattr(os, "posix_fallocate", without_control)
    with pytest.raises(PoolError, match="ctl needs"):
        Arena.create(prefix, GEOMETRY, 2, 7, RESERVE)
    assert objects() == []


def test_a_pool_that_does_not_exist_cannot_be_opened(prefix: str) -> None:
    with pytest.raises(PoolError, match="cannot be opened"):
        Arena.open(prefix)


@pytest.mark.parametrize("by_bytes", [-4096, 4096])
def test_a_control_segment_of_another_size_is_refused(arena: Arena, prefix: str, by_bytes: int) -> None:
    os.ftruncate(arena.control_fd, os.fstat(arena.control_fd).st_size + by_bytes)
    before = open_descriptors()
    with pytest.raises(PoolError, match=r"control segment has .* bytes and its header says"):
        Arena.open(prefix, arena.data_fd)
    assert open_descriptors() == before


@pytest.mark.parametrize("size_bytes", [GEOMETRY.total_bytes - 4096, GEOMETRY.total_bytes + 4096])
def test_data_of_another_size_is_refused(arena: Arena, prefix: str, size_bytes: int) -> None:
    other, _ = make_data("other", size_bytes, "off")
    before = open_descriptors()
    with pytest.raises(PoolError, match=r"data segment has .* bytes and its header says"):
        Arena.open(prefix, other)
    assert open_descriptors() == before
    os.close(other)


@pytest.mark.parametrize(
    ("offset", "value", "reason"),
    [
        (0, b"X", "not a control segment"),
        (8, struct.pack("<I", 2), "version 2"),
        (16, struct.pack("<I", 0), "0 queues"),
        (20, struct.pack("<I", 9), "9 classes"),
        (24, struct.pack("<I", 8), "8 slots"),
        (32, struct.pack("<Q", 1), "1 bytes"),
        (64 + 8, struct.pack("<I", 4095), "not ascending whole pages"),
        (96, struct.pack("<Q", 0), "do not follow"),
        (96 + 16, struct.pack("<I", 0), "do not follow"),
    ],
)
def test_a_damaged_header_is_refused(offset: int, value: bytes, reason: str) -> None:
    page = bytearray(ControlHeader(7, 2, GEOMETRY, RESERVE).pack())
    page[offset : offset + len(value)] = value
    with pytest.raises(PoolError, match=reason):
        ControlHeader.unpack(bytes(page))


def test_a_header_survives_the_round_trip() -> None:
    header = ControlHeader(7, 2, GEOMETRY, RESERVE)
    assert ControlHeader.unpack(header.pack()) == header


def test_an_empty_control_segment_is_refused(arena: Arena) -> None:
    os.ftruncate(arena.control_fd, 0)
    with pytest.raises(PoolError, match="no header"):
        Control(arena.control_fd)


def test_orphans_are_those_of_this_instance_only(prefix: str) -> None:
    stranger = arena_prefix(f"{INSTANCE}-0", 1)
    for name in (f"{prefix}-data", f"{stranger}-data", f"{stranger}-ctl"):
        os.close(posix_ipc.SharedMemory(name, posix_ipc.O_CREX).fd)
    assert list_orphans(INSTANCE) == [prefix]
    unlink_arena(prefix)
    unlink_arena(stranger)
    assert objects() == []


@pytest.mark.parametrize("instance", ["", "a/b", "x" * 65, "a b"])
def test_an_instance_that_cannot_be_a_name_is_refused(instance: str) -> None:
    with pytest.raises(PoolError, match="instance"):
        arena_prefix(instance, 0)
