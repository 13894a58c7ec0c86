"""Zero copy: what it refuses and asks of the driver, and what an engine does with pages that the kernel registered."""

import asyncio
import errno
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.fakes.device_parts import fake_context
from support.fakes.driver import IOD_FUA, SECTOR_BYTES, Holder, Request
from support.fakes.file_inside import FSYNC, MIB, READ_FIXED, RWF_DSYNC, WRITE_FIXED, FileInside
from support.fakes.queue_rig import Plan
from ublkpool.bufpool.engine import _engine
from ublkpool.bufpool.wire import Attach, Op
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.kernel.disk_parameters import parameters, wanted_flags
from ublkpool.daemon.processes.background import Background
from ublkpool.daemon.settings.config import BackendConfig, Conflict, DeviceConfig
from ublkpool.daemon.supervisor import Supervisor
from ublkpool.ublk import abi
from ublkpool.ublk.abi import Feature
from ublkpool.ublk.errors import UnsupportedError

EVERYTHING, LINUX_6_12, LINUX_6_15 = (1 << 64) - 1, 0x1FE, 0x7FF
FILE = BackendConfig(kind="file", options={"path": "/x"})


def config(**more: Any) -> DeviceConfig:
    return DeviceConfig(**{"name": "vol", "backend": FILE, "isolation": "none", "zero_copy": True, **more})


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"isolation": "process"}, "set isolation to none"),
        ({"backend": BackendConfig(kind="memory")}, "only the backend file .* not memory"),
        (
            {"backend": BackendConfig(kind="http"), "isolation": "process"},
            "only the backend file .* not http",
        ),
        ({"backend": None, "isolation": "process"}, "only the backend file .* not no backend"),
        ({"client_buffers_bytes": 8 * MIB}, "use isolation process"),
        ({"on_timeout": "fail"}, "use on_timeout wait"),
    ],
)
def test_what_cannot_use_a_clients_pages_is_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(Conflict, match=reason):
        config(**fields)


def test_the_driver_is_asked_for_registered_pages_and_not_for_a_copy() -> None:
    flags = wanted_flags(config(), EVERYTHING)
    assert flags & (Feature.SUPPORT_ZERO_COPY | Feature.AUTO_BUF_REG | Feature.NEED_GET_DATA) == (
        Feature.SUPPORT_ZERO_COPY | Feature.AUTO_BUF_REG
    )
    assert not wanted_flags(config(zero_copy=False), EVERYTHING) & Feature.AUTO_BUF_REG


def test_a_device_that_the_kernel_cannot_have_makes_no_store(tmp_path: Path) -> None:
    async def run() -> None:
        context, store = fake_context(), tmp_path / "refused.img"
        context.offered = EVERYTHING & ~Feature.AUTO_BUF_REG
        backend = BackendConfig(kind="file", options={"path": str(store), "size": "16M"}, cwd="/")
        supervisor = Supervisor(context, Background("the daemon"))
        with pytest.raises(
            DaemonError, match=r"^vol: this kernel.* not offer AUTO_BUF_REG, which zero_copy needs"
        ):
            await supervisor.add(config(backend=backend), lambda _: None)
        assert not store.exists() and supervisor.list() == []

    asyncio.run(run())


@pytest.mark.parametrize(
    ("offered", "missing"), [(LINUX_6_12, "SUPPORT_ZERO_COPY, AUTO_BUF_REG"), (LINUX_6_15, "AUTO_BUF_REG")]
)
def test_a_driver_without_it_refuses_by_the_settings_name(offered: int, missing: str) -> None:
    with pytest.raises(
        UnsupportedError, match=rf"^vol: .* not offer {missing}, which zero_copy needs.*6\.16"
    ):
        wanted_flags(config(), offered)


def test_a_users_own_device_cannot_have_it() -> None:
    with pytest.raises(UnsupportedError, match=r"^vol: .*CAP_SYS_ADMIN"):
        wanted_flags(config(recovery="none"), EVERYTHING, is_privileged=False)


def test_a_clients_memory_is_aligned_as_the_files_direct_io_needs_it() -> None:
    attach = Attach(v=1, device="vol", kind="file", size_bytes=MIB, logical_block_bytes=4096)
    sent = parameters(config(), MIB, attach).pack()
    copied = parameters(config(zero_copy=False), MIB, attach).pack()
    types, dma_align = struct.unpack_from("<I", sent, 4)[0], 1 << 4
    assert types & dma_align and struct.unpack_from("<2I", sent, 108) == (4095, 0)
    assert struct.unpack_from("<I", sent)[0] == len(sent) == 116
    assert len(copied) == abi.PARAMS_BYTES and not struct.unpack_from("<I", copied, 4)[0] & dma_align
    assert sent[8:60] == copied[8:60]


@pytest.fixture
def inside(tmp_path: Path) -> Iterator[FileInside]:
    made = FileInside(tmp_path / "disk", Plan(need_get_data=False, zero_copy=True))
    yield made
    made.close()


@pytest.mark.parametrize(("op", "opcode"), [(Op.READ, READ_FIXED), (Op.WRITE, WRITE_FIXED)])
def test_a_requests_io_is_on_the_pages_of_its_tag(inside: FileInside, op: Op, opcode: int) -> None:
    request = Request(op, 5, 2)
    entry = inside.deliver(3, request)
    assert entry[:5] == (opcode, 5 * SECTOR_BYTES, 0, 2 * SECTOR_BYTES, 0)
    assert entry.buffer == 3
    assert inside.driver.registered == {3} and inside.driver.holders[3] is Holder.SERVER
    assert inside.complete(entry, 2 * SECTOR_BYTES) == []
    assert request.result == 2 * SECTOR_BYTES
    assert inside.driver.registered == set()
    counted = inside.side.statistics
    assert (counted.zero_copies, counted.zero_copy_bytes) == (1, 2 * SECTOR_BYTES)
    assert (counted.kernel_read_bytes, counted.kernel_write_bytes, counted.own_copy_bytes) == (0, 0, 0)


def test_fua_is_the_files_too(inside: FileInside) -> None:
    assert inside.deliver(0, Request(Op.WRITE, 0, 1, flags=IOD_FUA)).rw_flags == RWF_DSYNC
    assert inside.deliver(1, Request(Op.READ, 0, 1, flags=IOD_FUA)).rw_flags == 0


@pytest.mark.parametrize("op", [Op.READ, Op.WRITE])
def test_io_that_moved_less_goes_on_behind_it_before_the_commit(inside: FileInside, op: Op) -> None:
    request = Request(op, 8, 4)
    first = inside.deliver(1, request)
    (second,) = inside.complete(first, SECTOR_BYTES)
    assert request.result is None and inside.driver.registered == {1}
    assert (second.opcode, second.address, second.length) == (first.opcode, SECTOR_BYTES, 3 * SECTOR_BYTES)
    assert (second.offset, second.buffer) == (9 * SECTOR_BYTES, 1)
    inside.complete(second, 3 * SECTOR_BYTES)
    assert request.result == 4 * SECTOR_BYTES


@pytest.mark.parametrize("op", [Op.READ, Op.WRITE])
def test_an_error_of_the_file_is_the_requests(inside: FileInside, op: Op) -> None:
    request = Request(op, 0, 4)
    inside.complete(inside.deliver(2, request), -errno.EIO)
    assert request.result == -errno.EIO


def test_a_flush_has_no_pages_and_ends_with_0(inside: FileInside) -> None:
    request = Request(Op.FLUSH, 0, 0)
    entry = inside.deliver(0, request)
    assert entry.opcode == FSYNC and inside.driver.registered == set()
    inside.complete(entry, 0)
    assert request.result == 0


def test_a_discard_is_answered_without_a_byte(inside: FileInside) -> None:
    request = Request(Op.DISCARD, 8, 8)
    inside.complete(inside.deliver(0, request), 0)
    assert request.result == 0


def test_no_tag_keeps_a_buffer_of_the_pool(inside: FileInside) -> None:
    entries = [inside.deliver(tag, Request(Op.READ, tag, 1)) for tag in range(inside.rig.plan.depth)]
    assert inside.side.statistics.buffers_lent == 0
    for entry in entries:
        inside.complete(entry, SECTOR_BYTES)


def test_a_storage_that_knows_no_fixed_buffers_refuses_them() -> None:
    ffi, lib = _engine.ffi, _engine.lib
    setup = ffi.new("struct engine_setup *")
    setup.queues = setup.depth = setup.fixed_buffers = 1
    error = ffi.new("int *")
    assert lib.engine_open(setup, lib.storage_null_new(4096), error) == ffi.NULL
    assert error[0] == -errno.EOPNOTSUPP
