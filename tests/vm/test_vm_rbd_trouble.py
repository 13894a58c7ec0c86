"""A disk on an image whose cluster is in trouble: its clients wait, go on after it, and each answered write is kept.

Each client writes rising numbers to blocks of its own and reads them back, beside a model of what was answered.
"""

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.ceph.cluster import POOL, Cluster, Shape
from support.ceph.serving import options
from support.vm.daemon import Daemon, eventually, total
from support.vm.process import read_block, write_block

pytestmark = [pytest.mark.one_kernel("7.3"), pytest.mark.long]
BLOCK = 4096
BLOCKS, CLIENTS = 8, 4
ROUNDS = 5
SILENT_S = 5.0
PATIENCE_S = 300


class Client:
    """A thread that writes and reads blocks of its own until it is told to end."""

    def __init__(self, path: str, number: int) -> None:
        self._path, self._number = path, number
        self._rng = random.Random(number)
        self._answered = dict.fromkeys(range(number * BLOCKS, (number + 1) * BLOCKS), 0)
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.done = 0
        self.wrong = ""
        self._thread.start()

    def end(self) -> None:
        """Let it end; it judges every block before."""
        self._ends.set()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive() and not self.wrong, self.wrong

    def _run(self) -> None:
        try:
            while not self._ends.is_set():
                self._write(self._rng.choice(list(self._answered)))
                self._judge(self._rng.choice(list(self._answered)))
                self.done += 1
            for number in self._answered:
                self._judge(number)
        except (AssertionError, OSError) as error:
            self.wrong = f"client {self._number}: {error!r}"

    def _write(self, number: int) -> None:
        value = self._answered[number] + 1
        error = write_block(self._path, number * BLOCK, _content(number, value))
        assert error == 0, (number, value, error)
        self._answered[number] = value

    def _judge(self, number: int) -> None:
        value = self._answered[number]
        found = read_block(self._path, number * BLOCK, BLOCK)
        assert found == (_content(number, value) if value else bytes(BLOCK)), (number, value, found[:16])


def _content(number: int, value: int) -> bytes:
    return (number << 32 | value).to_bytes(8, "big") * (BLOCK // 8)


class Crowd:
    """All clients of the disk."""

    def __init__(self, daemon: Daemon, path: str) -> None:
        self._daemon = daemon
        self._clients = [Client(path, number) for number in range(CLIENTS)]

    def go_on(self) -> None:
        """Return when each has had more answers."""
        before = [each.done for each in self._clients]
        eventually(lambda: self._wrong() or self._are_past(before), "every client goes on", PATIENCE_S)
        assert not self._wrong(), self._wrong()

    def wait(self) -> None:
        """Return when each has waited for a while, for an answer that does not come."""
        eventually(lambda: self._wrong() or self._is_silent(), "every client waits", PATIENCE_S)
        assert not self._wrong(), self._wrong()

    def end(self) -> None:
        """End them; each judges every block."""
        for each in self._clients:
            each.end()

    def _are_past(self, before: list[int]) -> bool:
        # An answer may have been on its way: the next but one was asked for afterwards.
        return all(each.done >= done + 2 for each, done in zip(self._clients, before, strict=True))

    def _is_silent(self) -> bool:
        before = [each.done for each in self._clients]
        time.sleep(SILENT_S)
        return self._in_flight() == CLIENTS and before == [each.done for each in self._clients]

    def _in_flight(self) -> int:
        return sum(each.in_flight for each in self._daemon.stats("troubled").queues)

    def _wrong(self) -> str:
        return next((each.wrong for each in self._clients if each.wrong), "")


@contextmanager
def _crowd(daemon: Daemon, cluster: Cluster) -> Iterator[Crowd]:
    """Clients on a disk of a new image; no request fails, and each block is judged at the end."""
    cluster.rbd("create", "--size", "16M", f"{POOL}/troubled")
    with daemon.device("troubled", "rbd", options=options(cluster, "troubled"), queues=2) as status:
        assert status.path is not None
        crowd = Crowd(daemon, status.path)
        crowd.go_on()
        yield crowd
        crowd.go_on()
        crowd.end()
        stats = daemon.rest("troubled")
        assert total(stats, "errors") == total(stats, "violations") == 0


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    settings = {"mon_allow_pool_size_one": "true"}
    with Cluster(
        tmp_path / "cluster", Shape(stores=("bluestore",), replicas=1, network=True, settings=settings)
    ) as cluster:
        yield cluster


def _kill(cluster: Cluster) -> None:
    cluster.kill("osd.0")


def _revive(cluster: Cluster) -> None:
    cluster.revive("osd.0")
    cluster.wait_until_up(1)


Step = Callable[[Cluster], None]


def test_clients_wait_while_the_cluster_is_cut_off_dead_or_full_and_lose_no_answered_write(
    daemon: Daemon, cluster: Cluster
) -> None:
    troubles: dict[str, tuple[Step, Step]] = {
        "cut": (Cluster.cut, Cluster.heal),
        "dead": (_kill, _revive),
        "full": (Cluster.fill, Cluster.make_room),
    }
    with _crowd(daemon, cluster) as crowd:
        for turn in range(ROUNDS):
            for name, (begin, end) in troubles.items():
                begin(cluster)
                crowd.wait()
                end(cluster)
                crowd.go_on()
                print(f"rbd: {name}, round {turn + 1}: every client went on", flush=True)
