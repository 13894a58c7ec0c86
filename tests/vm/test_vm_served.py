"""`live` is said of a disk that a backend serves; a group's backends find their queues again after a service's restart.

The backends are processes of a user who is only a member of the daemon's group.
"""

import errno
import os
import re
from pathlib import Path

import pytest

from support.vm.daemon import Daemon, eventually
from support.vm.process import Forked, write_block
from ublkpool.backends.null import NullBackend, NullOptions
from ublkpool.bufpool.errors import PoolError
from ublkpool.bufpool.sdk.client import Transport
from ublkpool.bufpool.sdk.serving import serve
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.status import DeviceStatus

pytestmark = pytest.mark.one_kernel("7.3")
GROUP = "nogroup"
NOBODY = 65534
MIB = 1 << 20
NONE_YET = "no backend is attached, requests wait"


def _backend(daemon: Daemon, transport: Transport = "ring", denied_patience_s: float = 5.0) -> Forked:
    """A backend of another user, whose output goes to a file, and which is denied for so long before it ends."""
    said = daemon.path("said")
    said.touch()
    said.chmod(0o666)

    def run() -> int:
        # Imported here, because the other user cannot read these files.
        import ublkpool.bufpool.engine.native
        import ublkpool.bufpool.sdk.ring_links
        import ublkpool.bufpool.sdk.zeromq_links  # noqa: F401
        from ublkpool.bufpool.sdk import doors

        doors._PATIENCE_S[errno.EACCES] = denied_patience_s
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        try:
            return serve(
                NullBackend(NullOptions(size=MIB)), device="vol", run_dir=daemon.run_dir, transport=transport
            )
        except PoolError as error:
            said.write_text(str(error))
            return 1

    return Forked(run)


def _queues(daemon: Daemon) -> list[Path]:
    return sorted((daemon.run_dir / "queues").iterdir())


def _owner(path: Path) -> tuple[int, int, int]:
    about = path.stat()
    return about.st_uid, about.st_gid, about.st_mode & 0o777


def _restarted_by_systemd(daemon: Daemon) -> None:
    """Do what systemd does to the entries of a RuntimeDirectory= of a unit without User=."""
    daemon.client.stop(leave=True)
    assert daemon.wait_end() == 0
    for path in (daemon.run_dir, *daemon.run_dir.rglob("*")):
        os.chown(path, 0, 0, follow_symlinks=False)
    daemon.start()


def _status(daemon: Daemon) -> DeviceStatus:
    return daemon.status("vol")


def test_a_groups_backends_serve_again_after_a_restart_and_the_device_is_live_only_then() -> None:
    daemon = Daemon(config=f'[daemon]\ngroup = "{GROUP}"\n', name="group")
    daemon.run_dir.parent.chmod(0o755)
    with daemon.life():
        daemon.add("vol", size_bytes=MIB, queues=2, depth=8, max_io_bytes=65536, rings=True)
        backend = _backend(daemon)
        path = daemon.wait_live("vol").path
        assert path is not None and write_block(path, 0, bytes(4096)) == 0
        meant = {each: _owner(each) for each in _queues(daemon)}
        assert set(meant.values()) == {(0, NOBODY, 0o660)}

        _restarted_by_systemd(daemon)
        assert {each: _owner(each) for each in _queues(daemon)} == meant
        assert (_status(daemon).state, _status(daemon).reason) == ("live", "")
        backend.kill()
        for transport in ("ring", "zeromq"):
            _check_that_it_is_served_when_a_backend_has_come(daemon, path, transport)
        _check_that_a_backend_that_is_denied_says_so(daemon, path)
        daemon.delete("vol")


def _check_that_it_is_served_when_a_backend_has_come(daemon: Daemon, path: str, transport: Transport) -> None:
    """The backend dies while there is no daemon."""
    _restarted_by_systemd(daemon)
    assert (_status(daemon).state, _status(daemon).reason) == ("recovering", NONE_YET)
    with pytest.raises(DaemonError, match=rf"still recovering after 0\.5 s: {NONE_YET}"):
        daemon.client.wait_live("vol", 0.5)
    with _backend(daemon, transport):
        daemon.wait_live("vol")
        assert _status(daemon).backend.attached and not _status(daemon).reason
        assert write_block(path, 0, bytes(4096)) == 0


def _is_attached_without_hello(status: DeviceStatus) -> bool:
    is_named = "HELLO on queue 1 yet" in status.reason
    return is_named and status.state == "recovering" and status.backend.attached


def _check_that_a_backend_that_is_denied_says_so(daemon: Daemon, path: str) -> None:
    denied = next(each for each in _queues(daemon) if each.name.endswith(".1.ring"))
    os.chown(denied, 0, 0)
    eventually(lambda: not _status(daemon).backend.attached, "the last one is gone")
    # So long that it is still there when its status is asked for.
    backend = _backend(daemon, denied_patience_s=20.0)
    eventually(lambda: _is_attached_without_hello(_status(daemon)), "the queue is named")
    assert backend.wait() == 1
    said = daemon.path("said").read_text()
    assert re.match(rf"queue 1: {denied}: Permission denied for 20 s: run this backend as root, or", said)
    os.chown(denied, 0, NOBODY)
    with _backend(daemon):
        daemon.wait_live("vol")
        assert write_block(path, 0, bytes(4096)) == 0
