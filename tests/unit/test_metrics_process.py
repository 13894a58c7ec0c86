"""The exporter as the daemon's child: its rights, its death, the daemon's death, and the next daemon."""

import asyncio
import os
import pwd
import shutil
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from support.fakes.daemon import FakeService
from ublkpool.daemon.admin.server import AdminServer
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.processes import unix_socket
from ublkpool.daemon.processes.left_behind import identify
from ublkpool.daemon.processes.listeners import listen_at, shown
from ublkpool.daemon.processes.metrics_process import RECORD, MetricsProcess, end_left
from ublkpool.daemon.settings.listen import ListenAddress

DEADLINE_S = 200
GET = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"


class Rig:
    """An admin server and the exporter of a daemon in this directory."""

    def __init__(self, run_dir: Path, address: ListenAddress | None = None) -> None:
        self.run_dir = run_dir
        self.path = run_dir / "metrics.sock"
        self.server = AdminServer(FakeService(), run_dir)
        self.exporter = MetricsProcess(
            run_dir, address or ListenAddress(path=self.path), None, self.server.serve_watcher
        )

    async def scrape(self) -> str:
        """The page, as soon as there is one."""
        while True:
            with suppress(OSError):
                reader, writer = await asyncio.open_unix_connection(self.path)
                try:
                    writer.write(GET)
                    text = await reader.read()
                finally:
                    writer.transport.abort()
                if text:
                    return text.decode()
            await asyncio.sleep(0.01)

    async def until_up(self, value: int) -> None:
        while f"\nublkpool_up {value}.0\n" not in await self.scrape():
            await asyncio.sleep(0.05)


@asynccontextmanager
async def running(rig: Rig) -> AsyncIterator[int]:
    """The exporter's process number, while it runs."""
    await rig.server.start()
    rig.exporter.begin()
    try:
        await rig.until_up(1)
        pid = rig.exporter.pid
        assert pid is not None
        yield pid
    finally:
        await rig.exporter.stop()
        await rig.server.close(0)


def in_loop(test: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await asyncio.wait_for(test(), DEADLINE_S)

    asyncio.run(run())


def ids(pid: int, key: str) -> set[int]:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return set(map(int, line.split()[1:]))
    raise AssertionError(key)


def test_the_exporter_serves_without_rights_until_its_daemon_stops_it(tmp_path: Path) -> None:
    async def test() -> None:
        rig = Rig(tmp_path)
        async with running(rig) as pid:
            assert "ublkpool_build_info" in await rig.scrape()
            assert rig.path.stat().st_mode & 0o777 == 0o600
            if os.geteuid() == 0:
                nobody = pwd.getpwnam("nobody")
                assert ids(pid, "Uid") == {nobody.pw_uid}
                assert ids(pid, "Gid") == {nobody.pw_gid}
                assert ids(pid, "Groups") == set()
                status = Path(f"/proc/{pid}/status").read_text()
                for name in ("CapEff", "CapPrm", "CapBnd"):
                    assert f"{name}:\t0000000000000000\n" in status
                assert "NoNewPrivs:\t1\n" in status
            assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "0\n"
        assert identify("metrics", pid) is None
        assert list(tmp_path.iterdir()) == []

    in_loop(test)


def test_a_killed_exporter_is_started_again_at_the_same_address(tmp_path: Path) -> None:
    async def test() -> None:
        rig = Rig(tmp_path)
        async with running(rig) as pid:
            before = rig.path.stat().st_ino
            os.kill(pid, signal.SIGKILL)
            while rig.exporter.pid == pid:
                await asyncio.sleep(0.01)
            await rig.until_up(1)
            assert rig.path.stat().st_ino == before

    in_loop(test)


def test_an_exporter_that_is_told_nonsense_ends_and_the_daemon_starts_another(tmp_path: Path) -> None:
    async def test() -> None:
        rig = Rig(tmp_path)
        told: list[int] = []

        async def watch(sock: socket.socket) -> None:
            told.append(1)
            if len(told) > 1:
                await rig.server.serve_watcher(sock)
                return
            with sock:
                await asyncio.get_running_loop().sock_recv(sock, 4096)
                await asyncio.get_running_loop().sock_sendall(sock, b"nonsense\n")
                # The daemon does not hang up.
                await asyncio.Event().wait()

        rig.exporter = MetricsProcess(tmp_path, ListenAddress(path=rig.path), None, watch)
        async with running(rig):
            assert len(told) == 2

    in_loop(test)


def test_an_exporter_outlives_its_daemon_and_the_next_one_replaces_it(tmp_path: Path) -> None:
    async def test() -> None:
        rig = Rig(tmp_path)
        await rig.server.start()
        rig.exporter.begin()
        await rig.until_up(1)
        pid = rig.exporter.pid
        assert pid is not None
        # What is left when the daemon ends: the process, its socket, its record.
        rig.exporter.let_end()
        rig.exporter._background.cancel()
        assert rig.exporter._listener is not None
        rig.exporter._listener.close()
        await rig.server.close(0)
        await rig.until_up(0)
        assert (tmp_path / RECORD).exists()
        successor = Rig(tmp_path)
        async with running(successor) as other:
            assert other != pid
            assert identify("metrics", pid) is None
        assert list(tmp_path.iterdir()) == []

    in_loop(test)


def test_an_exporter_whose_run_directory_is_removed_ends(tmp_path: Path) -> None:
    async def test() -> None:
        run_dir = tmp_path / "run"
        run_dir.mkdir()
        rig = Rig(run_dir)
        await rig.server.start()
        rig.exporter.begin()
        await rig.until_up(1)
        rig.exporter.let_end()
        shutil.rmtree(run_dir)
        assert await rig.exporter.child.wait() == 0
        await rig.exporter.stop()
        await rig.server.close(0)

    in_loop(test)


def test_a_daemon_without_metrics_ends_the_exporter_of_an_earlier_one(tmp_path: Path) -> None:
    async def test() -> None:
        rig = Rig(tmp_path)
        async with running(rig) as pid:
            rig.exporter.let_end()
            await end_left(tmp_path)
            assert identify("metrics", pid) is None
            assert not rig.path.exists()
            assert not (tmp_path / RECORD).exists()
            await end_left(tmp_path)

    in_loop(test)


@pytest.mark.parametrize(
    "text", [b"", b"{}", b"\xff", b'{"process":["metrics"]}', b"[]", b'{"x":' + b"[" * 100_000]
)
def test_a_damaged_record_is_removed_with_a_warning(
    text: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / RECORD).write_bytes(text)
    in_loop(lambda: end_left(tmp_path))
    assert "not an exporter's record" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_the_process_that_has_a_dead_exporter_s_number_is_spared(tmp_path: Path) -> None:
    own = identify("metrics", os.getpid())
    assert own is not None
    record = (
        f'{{"process":{{"role":"metrics","pid":{own.pid},"start_ticks":{own.start_ticks - 1}}},"path":""}}'
    )
    (tmp_path / RECORD).write_text(record)
    in_loop(lambda: end_left(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_an_address_that_is_taken_is_tried_until_it_is_free(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        rig = Rig(tmp_path)
        # Not a socket: it is not replaced.
        rig.path.write_text("mine")
        await rig.server.start()
        rig.exporter.begin()
        while "cannot be started" not in caplog.text:
            await asyncio.sleep(0.01)
        assert rig.path.read_text() == "mine"
        rig.path.unlink()
        await rig.until_up(1)
        await rig.exporter.stop()
        await rig.server.close(0)
        assert caplog.text.count("cannot be started") == 1

    in_loop(test)


def test_a_listener_says_where_it_listens_and_why_it_cannot(tmp_path: Path) -> None:
    with listen_at(ListenAddress(host="127.0.0.1", port=0)) as listener:
        host, port = listener.getsockname()
        assert shown(listener) == f"http://127.0.0.1:{port}/metrics"
        with pytest.raises(
            DaemonError, match=rf"^127\.0\.0\.1:{port}: cannot listen: Address already in use"
        ):
            listen_at(ListenAddress(host=host, port=port))
    with pytest.raises(DaemonError, match=r"^192\.0\.2\.1:0: cannot listen: "):
        listen_at(ListenAddress(host="192.0.2.1", port=0))
    missing = tmp_path / "missing" / "x.sock"
    with pytest.raises(DaemonError, match=rf"^{missing}: cannot listen: "):
        listen_at(ListenAddress(path=missing))
    path = tmp_path / "x.sock"
    with listen_at(ListenAddress(path=path)) as listener:
        assert shown(listener) == f"unix:{path}"
        with pytest.raises(DaemonError, match=rf"^unix:{path}: cannot listen: another process does$"):
            listen_at(ListenAddress(path=path))
    # A socket that a dead process left is replaced.
    with listen_at(ListenAddress(path=path)), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    unix_socket.remove_socket(path)
