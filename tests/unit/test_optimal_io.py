"""The length of requests that a store prefers: from the backend's properties to the disk's parameters."""

from pathlib import Path

import msgspec
import pytest

from support.fakes.plain_backend import Plain
from support.fakes.worker import FakeWorker, serving
from ublkpool.bufpool import wire
from ublkpool.bufpool.errors import AttachRefused
from ublkpool.bufpool.sdk.backend import Properties
from ublkpool.daemon.backends.attach import check_attach
from ublkpool.daemon.kernel.disk_parameters import parameters
from ublkpool.daemon.settings.config import DeviceConfig

MIB = 1 << 20
ATTACH = wire.Attach(v=1, device="vol0", kind="x", size_bytes=MIB)


def said(optimal: int, physical: int = 4096) -> wire.Attach:
    return msgspec.structs.replace(ATTACH, optimal_io_bytes=optimal, physical_block_bytes=physical)


@pytest.mark.parametrize("optimal", [0, 4096, 4 * MIB, 32 * MIB])
def test_a_length_that_a_disk_can_have_becomes_its_parameter(optimal: int) -> None:
    check_attach(said(optimal), None)
    assert parameters(DeviceConfig(name="vol0"), MIB, said(optimal)).optimal_io_bytes == optimal


@pytest.mark.parametrize(
    ("optimal", "physical"),
    [
        (-1, 4096),
        (-4096, 4096),
        (1, 4096),
        (2048, 4096),
        (4096, 8192),
        (3 * 4096, 4096),
        (64 * MIB, 4096),
        (1 << 31, 4096),
        (1 << 63, 4096),
        (1 << 70, 4096),
    ],
)
def test_any_other_length_is_refused_in_one_line(optimal: int, physical: int) -> None:
    line = f"optimal_io_bytes {optimal} is not 0 or a power of two from {physical} to 32 MiB"
    with pytest.raises(AttachRefused) as refused:
        check_attach(said(optimal, physical), None)
    assert str(refused.value) == line


def attach_of(run_dir: Path, **described: object) -> wire.Attach:
    backend = Plain()
    backend.properties = Properties(size_bytes=MIB, optimal_io_bytes=4 * MIB)
    with FakeWorker(run_dir) as worker:
        worker.described = described
        with serving(worker, backend):
            assert worker.attach is not None
            return worker.attach


def test_a_daemon_that_knows_the_length_is_told_it(tmp_path: Path) -> None:
    assert attach_of(tmp_path, knows_optimal_io=True).optimal_io_bytes == 4 * MIB


def test_an_older_daemon_is_not_told_it(tmp_path: Path) -> None:
    assert b"optimal" not in wire.encode_message(attach_of(tmp_path))
