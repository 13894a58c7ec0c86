"""A file whose I/O runs on the clients' own pages (zero_copy): a file system, what it asks of clients, refusals."""

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.vm.daemon import Daemon, total
from support.vm.files import (
    check_file_system,
    checksums,
    copy_tree,
    forget_cached,
    make_file_system,
    mounted,
    run,
)
from support.vm.process import run_command
from support.vm.recovery import kill_worker, loaded, seeded, wait_for_epoch
from ublkpool.daemon.status import DeviceStatus
from ublkpool.ublk.abi import Feature
from ublkpool.ublk.control import get_features

BLOCK = 4096


def need_zero_copy() -> None:
    """Skip the test where the driver cannot register a request's pages."""
    if not get_features() & Feature.AUTO_BUF_REG:
        pytest.skip("this driver has no AUTO_BUF_REG")


@contextmanager
def zero_copy_disk(daemon: Daemon) -> Iterator[DeviceStatus]:
    """A device with zero copy on another device, so that its I/O is direct."""
    with daemon.device(
        "below", "memory", options={"size": "64M"}, placement="backend", isolation="none"
    ) as below:
        options = {"path": below.path, "direct": "on"}
        with daemon.device(
            "shared", "file", options=options, queues=2, isolation="none", zero_copy=True
        ) as status:
            yield status


@pytest.mark.one_kernel("7.3")
def test_killed_workers_and_a_killed_daemon_cost_the_client_nothing(daemon: Daemon) -> None:
    need_zero_copy()
    options = {"path": daemon.path("shared.img"), "size": "32M"}
    status = daemon.add("shared", "file", options, queues=2, isolation="none", zero_copy=True)
    with seeded() as rng, loaded(daemon, [status]) as (load,):
        for _ in range(2):
            before = kill_worker(daemon, "shared", rng)
            wait_for_epoch(daemon, "shared", before.epoch + 1)
            load.goes_on()
        daemon.crash()
        daemon.start()
        load.goes_on()
        assert daemon.status("shared").zero_copy
        assert total(daemon.stats("shared"), "zero_copies") > 0
    daemon.path("shared.img").unlink()


@pytest.mark.one_kernel("7.3")
def test_a_file_system_lives_on_clients_pages_and_nothing_is_copied(daemon: Daemon) -> None:
    need_zero_copy()
    with zero_copy_disk(daemon) as status:
        assert status.path is not None
        _check_what_list_tells(daemon, status)
        _check_that_memory_must_be_aligned(status.path)
        make_file_system("ext4", status.path)
        with mounted(status.path, daemon.path("mnt")) as root:
            copy_tree(root)
            expected = checksums(root)
            forget_cached()
        with mounted(status.path, daemon.path("mnt")) as root:
            forget_cached()
            assert checksums(root) == expected and len(expected) > 50
            run("fstrim", root)
        check_file_system("ext4", status.path)
        stats = daemon.rest("shared")
        copied = sum(
            total(stats, each) for each in ("kernel_write_bytes", "kernel_read_bytes", "own_copy_bytes")
        )
        assert (copied, total(stats, "errors"), total(stats, "violations")) == (0, 0, 0)
        moved = sum(queue.requests.read + queue.requests.write for queue in stats.queues)
        assert total(stats, "zero_copies") == moved > 0
        for operation in ("flush", "discard"):
            assert sum(getattr(queue.requests, operation) for queue in stats.queues) > 0, operation


def _check_what_list_tells(daemon: Daemon, status: DeviceStatus) -> None:
    assert (status.zero_copy, status.need_get_data) == (True, False)
    assert {"SUPPORT_ZERO_COPY", "AUTO_BUF_REG"} <= set(status.flags)
    assert "NEED_GET_DATA" not in status.flags
    shown = run_command(daemon, "list").out
    assert "none (zero copy)" in shown, shown


def _check_that_memory_must_be_aligned(path: str) -> None:
    """The file's direct I/O would refuse such pages: the kernel does so before."""
    queue = Path(f"/sys/block/{Path(path).name}/queue")
    assert (queue / "dma_alignment").read_text() == "511\n"
    with mmap.mmap(-1, 2 * BLOCK) as memory, memoryview(memory) as view:
        fd = os.open(path, os.O_RDWR | os.O_DIRECT)
        try:
            with pytest.raises(OSError, match="Invalid argument"):
                os.pwritev(fd, [view[4 : 4 + BLOCK]], 0)
            assert os.pwritev(fd, [view[512 : 512 + BLOCK]], 0) == BLOCK
        finally:
            os.close(fd)


ADD = ("add", "shared", "--backend", "file", "--zero-copy", "--size", "16M")


@pytest.mark.one_kernel("6.12")
def test_what_cannot_have_it_is_refused_in_one_line(daemon: Daemon) -> None:
    words = (f"path={daemon.path('refused.img')}", "size=16M")
    refused = run_command(daemon, *ADD, *words)
    assert refused.status == 2 and "set isolation to none" in refused.err, refused
    if get_features() & Feature.AUTO_BUF_REG:
        pytest.skip("this driver has AUTO_BUF_REG")
    refused = run_command(daemon, *ADD, "--isolation", "none", *words)
    assert not daemon.path("refused.img").exists(), "a refused device has made no file"
    assert refused.status == 1 and refused.err.count("\n") == 1, refused
    assert "AUTO_BUF_REG, which zero_copy needs" in refused.err and "6.16" in refused.err, refused
    assert daemon.client.devices() == []
