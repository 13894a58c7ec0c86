"""The daemon of an ordinary user: what it serves, and what it refuses in one line."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.vm.daemon import eventually, eventually_nothing
from support.vm.user_daemon import USER, UserDaemon
from ublkpool.daemon.errors import DaemonError, RemoteError
from ublkpool.daemon.kernel.opener import SERVER_KILLED, TITLE
from ublkpool.daemon.settings.user_devices import ANSWER_S_MAX, NOTE
from ublkpool.ublk.abi import Feature
from ublkpool.ublk.control import get_features

MIB = 1 << 20
# Of an interface that both kernels have.
pytestmark = pytest.mark.one_kernel("7.3")
WRITE_AND_COMPARE = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_SYNC)
data = os.urandom(1 << 20)
assert os.pwrite(fd, data, 1 << 20) == len(data)
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
assert os.pread(fd, len(data), 1 << 20) == data
"""


@pytest.fixture(scope="module")
def user_daemon() -> Iterator[UserDaemon]:
    """The daemon of this module; its end must leave nothing behind."""
    daemon = UserDaemon()
    with daemon.life():
        yield daemon


@pytest.fixture
def user(user_daemon: UserDaemon) -> Iterator[UserDaemon]:
    """The module's daemon, without a device before and after the test."""
    yield user_daemon
    eventually_nothing(user_daemon.leftovers, "the test leaves nothing")


def python(user: UserDaemon, code: str, *arguments: str) -> str:
    """Run this code as the user; its output."""
    ran = user.run(sys.executable, "-c", code, *arguments)
    assert ran.returncode == 0, ran
    return ran.stdout


def check_resize(user: UserDaemon) -> None:
    """The device grows, or where the driver cannot do that it is named and nothing changes."""
    if get_features() & Feature.UPDATE_SIZE:
        user.client.resize("vol", 16 * MIB)
        assert user.status("vol").size_bytes == 16 * MIB
        return
    with pytest.raises(RemoteError, match=r"has no UPDATE_SIZE \(Linux 6.16 has\): unmount the disk"):
        user.client.resize("vol", 16 * MIB)
    assert user.status("vol").size_bytes == 8 * MIB


def test_a_user_adds_uses_and_deletes_a_device(user: UserDaemon) -> None:
    store = f"path={user.home}/vol.img"
    ran = user.command_run("add", "--queues", "2", "--backend", "file", "vol", "--", store, "size=8M")
    assert ran.returncode == 0, (ran, user.said())
    path = ran.stdout.removesuffix("\n")
    assert Path(path).stat().st_uid == USER and NOTE in user.said()
    python(user, WRITE_AND_COMPARE, path)
    status = user.status("vol")
    assert (status.state, status.recovery) == ("live", "none") and "UNPRIVILEGED_DEV" in status.flags
    for worker in status.workers:
        assert f"Uid:\t{USER}\t" in Path(f"/proc/{worker.pid}/status").read_text()
    assert sum(queue.requests.write for queue in user.stats("vol").queues) > 0
    listed = user.command_run("list")
    assert listed.returncode == 0 and path in listed.stdout and " none " in listed.stdout
    check_resize(user)
    ran = user.command_run("del", "vol")
    assert (ran.returncode, ran.stdout) == (0, "vol\n"), ran
    assert not Path(path).exists()


@pytest.mark.long
def test_a_killed_daemon_is_followed_by_one_that_goes_on(user: UserDaemon) -> None:
    path = user.add("vol", "memory", {"size": "8M"}).path
    assert path is not None
    before = [each.pid for each in user.status("vol").workers]
    user.crash()
    user.start()
    user.wait_live("vol")
    assert [each.pid for each in user.status("vol").workers] == before
    python(user, WRITE_AND_COMPARE, path)
    # It also watches the process that the kernel takes for the server, and kills when a request is 30 s old.
    (server,) = (
        each.parent for each in Path("/proc").glob("[0-9]*/comm") if each.read_text().strip() == TITLE
    )
    os.kill(int(server.name), signal.SIGKILL)
    eventually(lambda: user.status("vol").state == "failed", "the device fails")
    assert SERVER_KILLED in user.status("vol").reason
    user.client.delete(["vol"])


@pytest.mark.long
def test_a_workers_death_ends_the_disk_and_the_device_says_so(user: UserDaemon) -> None:
    path = user.add("vol", "memory", {"size": "8M"}).path
    assert path is not None
    os.kill(user.status("vol").workers[0].pid, signal.SIGKILL)
    eventually(lambda: user.status("vol").state == "failed", "the device fails")
    assert "SIGKILL" in user.status("vol").reason
    eventually(lambda: not Path(path).exists(), "the disk goes")
    user.client.delete(["vol"])


@pytest.mark.long
def test_a_request_that_is_30_s_old_ends_its_disk_and_not_the_daemon(user: UserDaemon) -> None:
    path = user.add("vol", "memory", {"size": "8M"}).path
    assert path is not None
    worker = user.status("vol").workers[0].pid
    with user.stopped(worker):
        ran = user.run("dd", f"if={path}", "of=/dev/null", "bs=4096", "count=1", "iflag=direct")
        assert ran.returncode == 1 and "Input/output error" in ran.stderr, ran
    eventually(lambda: user.status("vol").state == "failed", "the device fails")
    assert SERVER_KILLED in user.status("vol").reason
    user.client.delete(["vol"])


def test_what_a_users_device_cannot_have_is_refused(user: UserDaemon) -> None:
    with pytest.raises(DaemonError, match=r"vol: recovery abort: .*ordinary user: leave recovery out"):
        user.add("vol", "null", size_bytes=MIB, recovery="abort")
    user.add("vol", "null", size_bytes=MIB)
    with pytest.raises(DaemonError, match=f"vol: io_timeout: at most {ANSWER_S_MAX:g}: "):
        user.client.set("vol", {"io_timeout": 60})
    with pytest.raises(DaemonError, match="vol: the kernel ends an ordinary user's disk"):
        user.client.drain("vol", True, None)
    user.delete("vol")
