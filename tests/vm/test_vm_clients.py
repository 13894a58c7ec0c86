"""Clients with buffers that the backend shares: nothing is copied if the driver has SHMEM_ZC, else everything is."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest

from support.vm.daemon import DEADLINE_S, Daemon, eventually, total
from support.vm.fio import finish_fio, start_fio
from support.vm.process import Forked, run_command
from support.vm.recovery import kill, wait_for_backend, wait_for_epoch
from ublkpool.bufpool.sdk.client_buffers import ClientBuffer
from ublkpool.ublk import control
from ublkpool.ublk.abi import Feature

EXAMPLES = Path(__file__).parents[2] / "examples"
MIB = 1 << 20
SLICES = 8
AREA_BYTES = SLICES * 4 * MIB


def is_offered() -> bool:
    return bool(control.get_features() & Feature.SHMEM_ZC)


def copied(daemon: Daemon, name: str) -> int:
    stats = daemon.stats(name)
    return total(stats, "kernel_write_bytes") + total(stats, "kernel_read_bytes")


def in_place(daemon: Daemon, name: str) -> int:
    return total(daemon.stats(name), "zero_copy_bytes")


class Disk:
    """Direct I/O through a client's buffer."""

    def __init__(self, buffer: ClientBuffer) -> None:
        self.buffer = buffer
        self.fd = os.open(buffer.path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)

    def write(self, offset: int, data: bytes, at: int = 0) -> None:
        self.buffer.view[at : at + len(data)] = data
        with self.buffer.view[at : at + len(data)] as part:
            assert os.pwritev(self.fd, [part], offset) == len(data)

    def read(self, offset: int, length: int, at: int = 0) -> bytes:
        with self.buffer.view[at : at + length] as part:
            part[:] = bytes(length)
            assert os.preadv(self.fd, [part], offset) == length
            return bytes(part)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)
        self.buffer.close()


@pytest.mark.parametrize(
    ("backend", "config"),
    [
        pytest.param("memory", {}, id="pool", marks=pytest.mark.one_kernel("7.3")),
        pytest.param("memory", {"placement": "backend", "queues": 2}, id="backend"),
        pytest.param(
            "memory", {"need_get_data": False, "depth": 32}, id="off", marks=pytest.mark.one_kernel("7.3")
        ),
    ],
)
def test_what_a_client_writes_from_a_shared_buffer_comes_back_and_nothing_is_copied(
    daemon: Daemon, backend: str, config: dict[str, object]
) -> None:
    name = f"clients-{config.get('placement', 'pool')}-{config.get('depth', 128)}"
    options = {"size": "32M", "placement": config.get("placement", "pool")}
    with daemon.device(name, backend, options=options, client_buffers_bytes=AREA_BYTES, **config) as status:
        assert ("SHMEM_ZC" in status.flags) == is_offered()
        before = copied(daemon, name)
        with Disk(ClientBuffer.open(name, MIB, run_dir=daemon.run_dir)) as disk:
            assert disk.buffer.is_shared == is_offered()
            moved = 0
            for index, length in enumerate((512, 4096, 12288, 65536, 512 * 1024)):
                data = os.urandom(length)
                disk.write(index * MIB, data, at=index * 4096)
                assert disk.read(index * MIB, length, at=64 * 1024) == data
                moved += 2 * length
            counted = (in_place(daemon, name), copied(daemon, name) - before)
            assert counted == ((moved, 0) if is_offered() else (0, moved))


@pytest.fixture
def shared(daemon: Daemon) -> Iterator[str]:
    """A disk with a client area, whose backend the daemon runs."""
    if not is_offered():
        pytest.skip("this kernel's driver lacks SHMEM_ZC")
    with daemon.device(
        "shared", "memory", options={"size": "32M"}, queues=2, client_buffers_bytes=AREA_BYTES
    ):
        yield "shared"


def free_slices(daemon: Daemon, name: str) -> int:
    return daemon.stats(name).clients.free_count


def _fio_in_a_buffer(daemon: Daemon, name: str) -> "subprocess.Popen[bytes]":
    """fio that reads through a client buffer; its io_uring requests outlive it if it is killed."""
    fio = (
        "exec fio --name=a --filename=$UBLKPOOL_DISK --direct=1 --thread=1 --ioengine=io_uring --rw=randread --bs=4k "
        "--iodepth=4 --size=1M --time_based=1 --runtime=3600 --iomem=mmapshared:$UBLKPOOL_BUFFER"
    )
    quiet = subprocess.DEVNULL
    return subprocess.Popen(
        daemon.command("client", name, "--", "sh", "-c", fio),
        stdin=quiet, stdout=quiet, stderr=quiet, env=daemon.environment(),
    )  # fmt: skip


@pytest.mark.one_kernel("7.3")
def test_a_dead_clients_slice_is_not_lent_while_its_requests_are_in_flight(
    daemon: Daemon, shared: str
) -> None:
    backend = daemon.status(shared).backend.pid or 0
    with _fio_in_a_buffer(daemon, shared) as client:
        eventually(lambda: in_place(daemon, shared) > MIB, "fio reads")
        assert free_slices(daemon, shared) == SLICES - 1
        with daemon.stopped(backend):
            # The backend will answer these reads into the dead client's memory.
            eventually(lambda: _under_way(daemon, shared) == 4, "reads are under way")
            client.kill()
            eventually(lambda: not is_lent(daemon, shared), "the end of the lease is noticed")
            clients = daemon.stats(shared).clients
            assert (clients.resting_count, clients.free_count) == (1, SLICES - 1)
            assert _under_way(daemon, shared) == 4
        eventually(lambda: free_slices(daemon, shared) == SLICES, "the slice is free again")


def _under_way(daemon: Daemon, name: str) -> int:
    """The number of reads in flight by the kernel's count; the worker's may still include its last commits."""
    node = Path(daemon.status(name).path or "")
    return int(Path(f"/sys/block/{node.name}/inflight").read_text().split()[0])


def is_lent(daemon: Daemon, name: str) -> bool:
    return daemon.stats(name).clients.lent_count > 0


@pytest.mark.one_kernel("6.12")
def test_a_slice_that_a_process_still_maps_is_not_lent_again(daemon: Daemon, shared: str) -> None:
    buffer = ClientBuffer.open(shared, run_dir=daemon.run_dir)
    keeper = Forked(lambda: _keep(buffer))
    buffer.close()
    eventually(lambda: daemon.stats(shared).clients.resting_count == 1, "the slice rests")
    others = [ClientBuffer.open(shared, run_dir=daemon.run_dir) for _ in range(SLICES)]
    assert [each.is_shared for each in others] == [True] * (SLICES - 1) + [False]
    keeper.kill()
    # The daemon looks for such processes only when a client asks and no slice is free.
    eventually(lambda: _gets_one(daemon, shared), "the last can be had again")
    for each in others:
        each.close()
    eventually(lambda: free_slices(daemon, shared) == SLICES, "all are free")


def _keep(buffer: ClientBuffer) -> int:
    """A process forked from a client: it has the client's memory but not its lease."""
    assert buffer._lease is not None
    buffer._lease.close()
    signal.pause()
    return 0


def _gets_one(daemon: Daemon, name: str) -> bool:
    with ClientBuffer.open(name, run_dir=daemon.run_dir) as buffer:
        return buffer.is_shared


@pytest.mark.one_kernel("7.3")
def test_fio_verifies_what_it_wrote_from_a_shared_buffer_while_processes_are_killed(
    daemon: Daemon, shared: str
) -> None:
    """The buffer has room for all requests of the job; verification reads through it, too."""
    with ClientBuffer.open(shared, run_dir=daemon.run_dir) as buffer:
        _verify_while_processes_are_killed(buffer, daemon, shared)


def _verify_while_processes_are_killed(buffer: ClientBuffer, daemon: Daemon, shared: str) -> None:
    status, before = daemon.status(shared), copied(daemon, shared)
    fio = start_fio(
        buffer.path, size=8 * MIB, iodepth=8, bssplit=None, bs="128k", verify_backlog=16, time_based=1, runtime=3600,
        iomem=f"mmapshared:/proc/{os.getpid()}/fd/{buffer.descriptor}",
    )  # fmt: skip
    eventually(lambda: in_place(daemon, shared) > MIB, "fio writes")
    kill(status.backend.pid or 0)
    wait_for_backend(daemon, shared, status.backend.pid)
    kill(status.workers[0].pid)
    wait_for_epoch(daemon, shared, 2)
    moved = in_place(daemon, shared)
    eventually(lambda: in_place(daemon, shared) > moved + MIB, "fio goes on")
    fio.send_signal(signal.SIGINT)
    result = finish_fio(fio, may_fail=True)
    assert result.errors == 0 and result.written_bytes and result.read_bytes, result.text
    assert copied(daemon, shared) == before


@pytest.fixture(scope="module")
def line_of_daemons() -> Iterator[Daemon]:
    with Daemon(name="clients").life() as daemon:
        yield daemon


@pytest.mark.one_kernel("7.3")
def test_a_client_goes_on_through_the_death_of_the_daemon_and_of_all_processes(
    line_of_daemons: Daemon,
) -> None:
    if not is_offered():
        pytest.skip("this kernel's driver lacks SHMEM_ZC")
    daemon, name = line_of_daemons, "heir"
    daemon.add(name, "memory", {"size": "32M"}, client_buffers_bytes=AREA_BYTES)
    with Disk(ClientBuffer.open(name, run_dir=daemon.run_dir)) as disk:
        _outlives_the_daemon(disk, daemon, name)
        _outlives_all_processes(disk, daemon, name)
    # The daemon cannot tell whether a process still maps the slice, so it does not lend it again.
    with Disk(ClientBuffer.open(name, MIB, run_dir=daemon.run_dir)) as late:
        assert not late.buffer.is_shared
        late.write(MIB, b"5" * 4096)
        assert late.read(MIB, 4096) == b"5" * 4096
    daemon.delete(name)


def _outlives_the_daemon(disk: Disk, daemon: Daemon, name: str) -> None:
    disk.write(0, b"1" * 65536)
    daemon.crash()
    disk.write(MIB, b"2" * 65536)
    daemon.start()
    clients = daemon.stats(name).clients
    assert (clients.lent_count, clients.lent_count + clients.free_count + clients.resting_count) == (
        1,
        SLICES,
    )
    eventually(lambda: free_slices(daemon, name) == SLICES - 1, "all but the client's are free")
    disk.write(2 * MIB, b"3" * 65536)


def _outlives_all_processes(disk: Disk, daemon: Daemon, name: str) -> None:
    daemon.crash_everything()
    daemon.start()
    before, moved = copied(daemon, name), in_place(daemon, name)
    assert [disk.read(n * MIB, 65536) for n in range(3)] == [b"%d" % n * 65536 for n in (1, 2, 3)]
    disk.write(0, b"4" * 65536)
    assert disk.read(0, 65536) == b"4" * 65536
    assert (copied(daemon, name), in_place(daemon, name)) == (before, moved + 5 * 65536)
    # The memory of the free slices is lost, and only the client knows its own.
    clients = daemon.stats(name).clients
    assert (clients.lent_count, clients.resting_count, clients.free_count) == (0, 1, 0)


@pytest.mark.one_kernel("7.3")
def test_the_example_and_fio_under_client_use_the_shared_buffer_or_are_copied(
    daemon: Daemon,
) -> None:
    fio = (
        "fio --name=a --filename=$UBLKPOOL_DISK --direct=1 --rw=write --bs=256k --iodepth=4 --ioengine=libaio"
    )
    words = "--iomem=mmapshared:$UBLKPOOL_BUFFER --size=4M --verify=crc32c --verify_state_save=0 --minimal"
    with daemon.device("lent", "memory", options={"size": "16M"}, client_buffers_bytes=AREA_BYTES) as status:
        before = copied(daemon, status.name)
        run = run_command(daemon, "client", status.name, "--", "sh", "-c", f"{fio} {words}")
        assert run.status == 0, run.out + run.err
        moved = (in_place(daemon, status.name), copied(daemon, status.name) - before)
        assert moved == ((8 * MIB, 0) if is_offered() else (0, 8 * MIB))
        example = subprocess.run(
            [sys.executable, str(EXAMPLES / "zero_copy_client.py"), status.name, str(daemon.run_dir)],
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=True,
        )
        assert example.stdout == ("in place\n" if is_offered() else "copied\n")
        clients = daemon.stats(status.name).clients
        eventually(
            lambda: free_slices(daemon, status.name) == SLICES * is_offered(), f"all are free, not {clients}"
        )
