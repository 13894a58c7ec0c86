"""A device whose backend stays away: by its policy its requests fail after a while, and are served by the next one."""

import errno
import os
import signal
from functools import partial

from support.vm_daemon import BackendProcess, Daemon, eventually, total
from support.vm_process import Forked, read_block, write_block
from support.vm_recovery import wait_for_backend

CHUNK = 4096
WAYS = ("pool", "backend")
PATIENCE_S = 1.5


def _start(daemon: Daemon, placement: str) -> BackendProcess:
    return daemon.backend("memory", placement, size="4M", placement=placement)


def _is_busy(daemon: Daemon, name: str) -> bool:
    return total(daemon.stats(name), "in_flight") > 0


def test_without_a_backend_requests_fail_after_their_patience_until_the_next_one_comes(
    daemon: Daemon,
) -> None:
    for name in WAYS:
        daemon.add(name, placement=name, on_absent="fail", absent_timeout_s=PATIENCE_S, size_bytes=4 << 20)
    backends = [_start(daemon, name) for name in WAYS]
    paths = [daemon.wait_live(name).path or "" for name in WAYS]
    kept = os.urandom(CHUNK)
    assert [write_block(path, 0, kept) for path in paths] == [0, 0]

    waiting = []
    for path, name, backend in zip(paths, WAYS, backends, strict=True):
        with daemon.stopped(backend.pid):
            waiting.append(Forked(partial(write_block, path, CHUNK, os.urandom(CHUNK))))
            eventually(partial(_is_busy, daemon, name), "the write is with a worker")
            backend.end(signal.SIGKILL)
    assert [each.wait() for each in waiting] == [errno.EIO] * 2
    assert [write_block(path, 2 * CHUNK, kept) for path in paths] == [errno.EIO] * 2
    assert [daemon.status(name).state for name in WAYS] == ["live"] * 2

    for name in WAYS:
        _start(daemon, name)
    for name in WAYS:
        wait_for_backend(daemon, name, None)
    assert [write_block(path, CHUNK, kept) for path in paths] == [0, 0]
    assert [read_block(path, 0, 2 * CHUNK) for path in paths] == [2 * kept] * 2
    for name in WAYS:
        assert daemon.said().count(f"{name}: no backend for {PATIENCE_S:g} s") == 1
        daemon.delete(name)
