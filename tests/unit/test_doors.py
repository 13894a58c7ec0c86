"""A queue's socket that a backend cannot reach: the backend waits a while, then ends with an error that names it."""

import errno
import os
import socket
import tempfile
from pathlib import Path

import pytest

from ublkpool.bufpool import wire
from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk import doors
from ublkpool.bufpool.sdk.client import Transport, make_links
from ublkpool.bufpool.sdk.doors import DENIED_PATIENCE_S, MISSING_PATIENCE_S, Door
from ublkpool.ublk.queue import HELLO_TIMEOUT_MS


class Clock:
    """Stands for the `time` module in `doors.py`; only the test moves it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        monkeypatch.setattr(doors, "time", self)

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.mark.parametrize(
    ("error", "patience_s", "said"),
    [
        (
            errno.EACCES,
            DENIED_PATIENCE_S,
            r"/q/0\.1: Permission denied for 5 s: run this backend as root, or as",
        ),
        (
            errno.ENOENT,
            MISSING_PATIENCE_S,
            r"/q/0\.1: No such file or directory for 25 s: its worker has not",
        ),
    ],
)
def test_a_socket_that_stays_out_of_reach_ends_the_backend_and_is_named(
    clock: Clock, error: int, patience_s: float, said: str
) -> None:
    door = Door(1, "/q/0.1")
    door.failed(error)
    clock.now_s += patience_s - 0.1
    door.failed(error)
    clock.now_s += 0.1
    with pytest.raises(BackendError, match=rf"^queue 1: {said}"):
        door.failed(error)


@pytest.mark.parametrize("between", [0, errno.ECONNREFUSED, errno.EAGAIN])
def test_a_different_error_in_between_restarts_the_wait(clock: Clock, between: int) -> None:
    door = Door(0, "/q")
    for _ in range(3):
        door.failed(errno.EACCES)
        clock.now_s += DENIED_PATIENCE_S - 1
        if between:
            door.failed(between)
        else:
            door.reached()


def test_the_wait_for_a_missing_worker_ends_before_its_successor_kills_for_silence() -> None:
    assert 1000 * MISSING_PATIENCE_S < HELLO_TIMEOUT_MS


def _attached(path: Path) -> wire.Attached:
    return wire.Attached(
        v=wire.PROTOCOL_VERSION,
        device="vol",
        device_number=0,
        size_bytes=1 << 20,
        logical_block_bytes=4096,
        queues=1,
        depth=4,
        max_io_bytes=4096,
        need_get_data=True,
        placement="pool",
        read_only=False,
        epoch=1,
        token="01" * wire.TOKEN_BYTES,
        endpoints=(f"ipc://{path}",),
        rings=(str(path),),
        segments=(),
        own_segment=0,
        post_bytes=(),
        spin_us=0,
    )


def _until_it_ends(transport: Transport, path: Path) -> None:
    links = make_links(_attached(path), transport)
    try:
        # Each poll returns after half a second at most.
        for _ in range(1000):
            links.poll(None)
    finally:
        links.close()


@pytest.mark.parametrize("transport", ["ring", "zeromq"])
def test_both_transports_end_over_a_socket_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transport: Transport
) -> None:
    monkeypatch.setitem(doors._PATIENCE_S, errno.ENOENT, 0.6)
    with pytest.raises(BackendError, match=rf"^queue 0: {tmp_path}/q: No such file or directory for 0.6 s"):
        _until_it_ends(transport, tmp_path / "q")


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
@pytest.mark.parametrize("transport", ["ring", "zeromq"])
@pytest.mark.parametrize("shut", ["the socket", "its directory"])
def test_both_transports_end_over_a_socket_that_is_denied(transport: Transport, shut: str) -> None:
    with (
        tempfile.TemporaryDirectory() as name,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
    ):
        path = Path(name) / "q"
        listener.bind(str(path))
        listener.listen()
        path.chmod(0o600 if shut == "the socket" else 0o666)
        path.parent.chmod(0o755 if shut == "the socket" else 0o700)
        pid = os.fork()
        if pid == 0:
            os._exit(_as_nobody(transport, path))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _as_nobody(transport: Transport, path: Path) -> int:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    doors._PATIENCE_S[errno.EACCES] = 0.6
    try:
        _until_it_ends(transport, path)
    except BackendError as error:
        return 0 if f"{path}: Permission denied for 0.6 s" in str(error) else 2
    return 1
