"""A device without a backend: requests fail after `absent_timeout`, and the next backend serves later ones."""

import errno
import mmap
import os
from functools import partial
from typing import Any

import pytest

from support.vm.daemon import Daemon, eventually, total
from support.vm.hostile_backend import start_hostile
from support.vm.process import Forked, read_block, write_block
from support.vm.recovery import wait_for_backend

CHUNK = 4096
DISK_BYTES = 4 << 20
DEPTH = 8
MAX_IO_BYTES = 64 << 10
WAYS = ("pool", "backend")
PATIENCE_S = 1.5


def _start(daemon: Daemon, placement: str, disk: mmap.mmap) -> Forked:
    """A backend in a fork, which saves the start of Python; the next one serves the same bytes."""
    segment_bytes = DEPTH * MAX_IO_BYTES if placement == "backend" else 0
    return start_hostile(daemon.run_dir, placement, disk, segment_bytes=segment_bytes)


def _is_busy(daemon: Daemon, name: str) -> bool:
    return total(daemon.stats(name), "in_flight") > 0


@pytest.mark.one_kernel("7.3")
def test_without_a_backend_requests_fail_after_absent_timeout_until_the_next_one_attaches(
    daemon: Daemon,
) -> None:
    small: dict[str, Any] = {"size_bytes": DISK_BYTES, "depth": DEPTH, "max_io_bytes": MAX_IO_BYTES}
    for name in WAYS:
        daemon.add(name, placement=name, on_absent="fail", absent_timeout_s=PATIENCE_S, **small)
    disks = {name: mmap.mmap(-1, DISK_BYTES) for name in WAYS}
    backends = [_start(daemon, name, disks[name]) for name in WAYS]
    paths = [daemon.wait_live(name).path or "" for name in WAYS]
    kept = os.urandom(CHUNK)
    assert [write_block(path, 0, kept) for path in paths] == [0, 0]

    waiting = []
    for path, name, backend in zip(paths, WAYS, backends, strict=True):
        with daemon.stopped(backend.pid):
            waiting.append(Forked(partial(write_block, path, CHUNK, os.urandom(CHUNK))))
            eventually(partial(_is_busy, daemon, name), "the write is with a worker")
            backend.kill()
    assert [each.wait() for each in waiting] == [errno.EIO] * 2
    assert [write_block(path, 2 * CHUNK, kept) for path in paths] == [errno.EIO] * 2
    assert [daemon.status(name).state for name in WAYS] == ["live"] * 2

    successors = [_start(daemon, name, disks[name]) for name in WAYS]
    for name in WAYS:
        wait_for_backend(daemon, name, None)
    assert [write_block(path, CHUNK, kept) for path in paths] == [0, 0]
    assert [read_block(path, 0, 2 * CHUNK) for path in paths] == [2 * kept] * 2
    for name in WAYS:
        assert daemon.said().count(f"{name}: no backend for {PATIENCE_S:g} s") == 1
        daemon.delete(name)
    assert [each.wait() for each in successors] == [0, 0]
