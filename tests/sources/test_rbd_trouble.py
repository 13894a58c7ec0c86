"""The backend rbd while its cluster is in trouble: requests wait, go on after it, and each answered write is kept.

A writer sends rising numbers to each block, beside a model of what was answered; reads of all blocks judge at the end.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.ceph.cluster import CLIENT, POOL, Cluster, Shape
from support.fakes.worker import FakeWorker, finish, spawn
from ublkpool.bufpool.wire import Kind, Op

BLOCK = 4096
BLOCKS = 64
DEPTH = 16
ROUNDS_MORE = 20


class Writer:
    """Writes blocks, and knows what each must hold."""

    def __init__(self, worker: FakeWorker) -> None:
        self._worker = worker
        self._wanted = dict.fromkeys(range(BLOCKS), 0)
        self._next = 0

    def begin(self) -> int:
        """Send a write with each tag, each to another block; returns how many."""
        sent = []
        for tag in range(DEPTH):
            number = self._next % BLOCKS
            self._next += 1
            self._wanted[number] += 1
            request = self._worker.describe(Kind.REQUEST, Op.WRITE, number * BLOCK, BLOCK, tag=tag)
            self._worker.pool[request.buffer : request.buffer + BLOCK] = self._content(number)
            sent.append(request)
        self._worker.send(0, sent)
        return len(sent)

    def take(self, count: int) -> None:
        """Take that many answers, each of a whole write."""
        for _ in range(count):
            answer = self._worker.receive()
            assert (answer.kind, answer.result) == (Kind.DONE, BLOCK)

    def is_silent(self, for_s: float) -> bool:
        """Whether no answer comes for a while."""
        return self._worker.is_silent(for_s=for_s)

    def write(self, rounds: int = 1) -> None:
        """Write and wait for the answers, several times."""
        for _ in range(rounds):
            self.take(self.begin())

    def judge(self) -> None:
        """Compare every block."""
        for number in self._wanted:
            assert self._worker.read(number * BLOCK, BLOCK) == self._content(number), number

    def _content(self, number: int) -> bytes:
        return (number << 32 | self._wanted[number]).to_bytes(8, "big") * (BLOCK // 8)


@contextmanager
def _serving(cluster: Cluster, directory: Path) -> Iterator[Writer]:
    """A device's backend on a new image; judged at the end."""
    cluster.rbd("create", "--size", "1M", f"{POOL}/disk")
    directory.mkdir()
    given = {"pool": POOL, "image": "disk", "conf": str(cluster.conf), "id": CLIENT}
    with FakeWorker(directory, depth=DEPTH) as worker:
        process = spawn(worker.run_dir, "rbd", given)
        try:
            worker.accept()
            writer = Writer(worker)
            writer.write(2 * BLOCKS // DEPTH)
            yield writer
            writer.write(BLOCKS // DEPTH)
            writer.judge()
        finally:
            process.kill()
            finish(process)


def _kill_and_revive(cluster: Cluster, writer: Writer, name: str, rounds: int) -> None:
    """Kill a server with writes under way, go on without it, and take it back."""
    sent = writer.begin()
    cluster.kill(name)
    writer.take(sent)
    writer.write(rounds)
    sent = writer.begin()
    cluster.revive(name)
    writer.take(sent)
    cluster.wait_until_up(len(cluster.shape.stores))
    writer.write(rounds)


@pytest.mark.long
def test_writes_go_on_when_osds_and_the_monitor_die_again_and_again_and_wait_while_the_cluster_is_full(
    tmp_path: Path,
) -> None:
    shape = Shape(stores=("bluestore", "memstore", "memstore"), replicas=3)
    with Cluster(tmp_path / "cluster", shape) as cluster, _serving(cluster, tmp_path / "device") as writer:
        for turn in range(ROUNDS_MORE):
            # Never the other OSDs: after a death the first one's copies come back later than the OSD itself.
            for name in ("osd.0", "mon.a"):
                _kill_and_revive(cluster, writer, name, 3 + turn % 5)
        cluster.fill()
        sent = writer.begin()
        assert writer.is_silent(5.0)
        cluster.make_room()
        writer.take(sent)


@pytest.mark.parametrize(
    ("times", "for_s"), [(1, 1.5), pytest.param(ROUNDS_MORE, 3.0, marks=pytest.mark.long)]
)
def test_writes_wait_for_an_osd_that_is_slow_and_go_on_with_it(
    tmp_path: Path, times: int, for_s: float
) -> None:
    # Each pause is shorter than the grace after which the other OSD reports it dead, so every write waits for it.
    shape = Shape(stores=("memstore", "memstore"))
    with Cluster(tmp_path / "cluster", shape) as cluster, _serving(cluster, tmp_path / "device") as writer:
        for _ in range(times):
            for name in cluster.osd_names:
                with cluster.paused(name):
                    sent = writer.begin()
                    assert writer.is_silent(for_s)
                writer.take(sent)
                writer.write(3)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes a network")
@pytest.mark.parametrize(
    ("times", "for_s"), [(1, 2.0), pytest.param(ROUNDS_MORE, 5.0, marks=pytest.mark.long)]
)
def test_writes_wait_while_the_network_is_cut_and_go_on_when_it_heals(
    tmp_path: Path, times: int, for_s: float
) -> None:
    shape = Shape(stores=("memstore",), replicas=1, network=True)
    with Cluster(tmp_path / "cluster", shape) as cluster, _serving(cluster, tmp_path / "device") as writer:
        for _ in range(times):
            cluster.cut()
            sent = writer.begin()
            assert writer.is_silent(for_s)
            cluster.heal()
            writer.take(sent)
            writer.write(3)
