"""The examples under fio, run as a user would, with NEED_GET_DATA and without."""

from functools import partial
from pathlib import Path

import pytest

from support.vm.daemon import Daemon, total
from support.vm.fio import run_fio
from ublkpool.daemon.status import DeviceStatus

pytestmark = pytest.mark.one_kernel("6.12")
EXAMPLES = Path(__file__).parents[2] / "examples"
MIB = 1 << 20


def _add(daemon: Daemon, example: str, name: str, need_get_data: bool, placement: str) -> DeviceStatus:
    options = {"size": "16M", "placement": placement}
    if example == "demo_batch":
        options["path"] = str(daemon.path(f"{example}-{name}.img"))
    shape = {"queues": 2, "depth": 32, "rings": need_get_data}
    config = {"need_get_data": need_get_data, "placement": placement, **shape}
    return daemon.add(name, str(EXAMPLES / f"{example}.py"), options, **config)


def _both_ways(daemon: Daemon, example: str) -> list[DeviceStatus]:
    return daemon.together(
        partial(_add, daemon, example, "off", False, "pool"),
        partial(_add, daemon, example, "backend", True, "backend"),
    )


def _run(daemon: Daemon, status: DeviceStatus, verify: str | None) -> int:
    """Returns the number of writes that landed in regions that the backend had posted."""
    assert status.path is not None
    result = run_fio(status.path, size=2 * MIB, iodepth=32, verify=verify)
    stats = daemon.rest(status.name)
    assert total(stats, "kernel_write_bytes") == result.written_bytes > 0
    assert total(stats, "errors") == total(stats, "violations") == total(stats, "own_copy_bytes") == 0
    daemon.delete(status.name)
    return total(stats, "posts_used")


def test_demo_null_takes_every_write(daemon: Daemon) -> None:
    for status in _both_ways(daemon, "demo_null"):
        _run(daemon, status, None)


def test_demo_event_answers_from_another_thread_what_was_written(daemon: Daemon) -> None:
    for status in _both_ways(daemon, "demo_event"):
        _run(daemon, status, "crc32c")


def test_demo_batch_finds_its_writes_in_the_pool_or_where_it_posted(daemon: Daemon) -> None:
    for status in _both_ways(daemon, "demo_batch"):
        assert bool(_run(daemon, status, "crc32c")) == (status.name == "backend")
        daemon.path(f"demo_batch-{status.name}.img").unlink()


def test_a_file_of_functions_is_a_backend(daemon: Daemon) -> None:
    disk = daemon.path("functions.img")
    disk.write_bytes(bytes(8 * MIB))
    status = daemon.add("functions", str(EXAMPLES / "file_functions.py"), {"path": disk})
    assert status.size_bytes == 8 * MIB
    _run(daemon, status, "crc32c")
    disk.unlink()
