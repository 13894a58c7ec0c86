"""An image of a cluster and two daemons, each in a network namespace as on a host: who serves it, and who says why not.

Both daemons share the kernel's driver, and nothing else: each has a run directory, a state directory and a link to the
cluster of its own.
"""

import errno
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from support.ceph.cluster import POOL, Cluster, Shape
from support.ceph.network import OtherHost
from support.ceph.serving import options
from support.vm.daemon import Daemon, eventually
from support.vm.process import Forked, read_block, write_block
from support.vm.warm_starts import Started

pytestmark = [pytest.mark.one_kernel("7.3"), pytest.mark.long]
BLOCK = 4096


class HostDaemon(Daemon):
    """A daemon on another host."""

    def __init__(self, link: OtherHost) -> None:
        super().__init__(name=link.name)
        self.link = link

    def _spawn(self, command: Sequence[str], log: Path, warm: bool = True) -> Started:
        return super()._spawn([*self.link.prefix, *command], log, warm)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    settings = {"mon_allow_pool_size_one": "true"}
    shape = Shape(stores=("memstore",), replicas=1, network=True, settings=settings)
    with Cluster(tmp_path_factory.mktemp("ceph") / "cluster", shape) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def hosts(cluster: Cluster) -> Iterator[tuple[HostDaemon, HostDaemon]]:
    with ExitStack() as stack:
        # One after the other: what the first one has does not count as left behind by the second.
        a, b = (
            stack.enter_context(HostDaemon(stack.enter_context(cluster.host(number))).life())
            for number in (1, 2)
        )
        yield a, b


def take_over(b: HostDaemon, given: dict[str, str]) -> tuple[str, float]:
    """`ublkpool add --take-over`; the disk's path, and after how many seconds its first write was answered."""
    words = [f"{key}={value}" for key, value in given.items()]
    began_s = time.monotonic()
    ran = b.command_run("add", "vol", "--take-over", "--io-timeout", "300", "--backend", "rbd", *words)
    assert ran.returncode == 0, (ran, b.said())
    path = ran.stdout.strip()
    assert write_block(path, 8 * BLOCK, b"b" * BLOCK) == 0
    return path, time.monotonic() - began_s


def report(capsys: pytest.CaptureFixture[str], what: str, took_s: float) -> None:
    with capsys.disabled():
        print(f"\nrbd: {what}: first write {took_s:.2f} s after the command")


def test_a_host_that_is_cut_off_with_writes_in_flight_ends_its_disk_once_another_took_over(
    cluster: Cluster, hosts: tuple[HostDaemon, HostDaemon], capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = hosts
    cluster.rbd("create", "--size", "16M", f"{POOL}/cut")
    given = options(cluster, "cut")
    of_a = a.add("vol", "rbd", given)
    assert of_a.path is not None and write_block(of_a.path, 0, b"1" * BLOCK) == 0
    a.link.cut()
    disk = of_a.path
    with Forked(lambda: write_block(disk, 0, b"2" * BLOCK)) as late:
        eventually(lambda: any(each.in_flight for each in a.stats("vol").queues), "the write is on its way")
        path, took_s = take_over(b, given)
        report(capsys, "guest, a host that is cut off", took_s)
        of_b = b.status("vol")
        assert path != of_a.path and of_b.id != of_a.id
        assert read_block(path, 0, BLOCK) == b"1" * BLOCK
        assert write_block(path, 0, b"3" * BLOCK) == 0
        assert late.running and a.status("vol").state != "failed", "the late write still waits"
        a.link.heal()
        eventually(lambda: a.status("vol").state == "failed", "the first host's device fails")
        assert late.wait() == errno.EIO
    assert "another client has taken the" in a.status("vol").reason
    assert read_block(path, 0, BLOCK) == b"3" * BLOCK
    # The first host adds it again, without a word of the operator's.
    words = [f"{key}={value}" for key, value in given.items()]
    ran = a.command_run("add", "vol", "--backend", "rbd", *words)
    assert ran.returncode != 0 and re.search("locked by .*--take-over", ran.stderr + a.said()), (
        ran,
        a.said(),
    )
    assert write_block(path, 0, b"4" * BLOCK) == 0 and read_block(path, 0, BLOCK) == b"4" * BLOCK
    b.delete("vol")
    a.client.delete(None, force=True)


def test_a_host_that_died_is_followed_and_does_not_serve_the_image_to_its_disk_when_it_is_back(
    cluster: Cluster, hosts: tuple[HostDaemon, HostDaemon], capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = hosts
    cluster.rbd("create", "--size", "16M", f"{POOL}/dead")
    given = options(cluster, "dead")
    of_a = a.add("vol", "rbd", given)
    assert of_a.path is not None and write_block(of_a.path, 0, b"1" * BLOCK) == 0
    # So that the cluster does not hear of its end.
    a.link.cut()
    a.crash_everything()
    path, took_s = take_over(b, given)
    report(capsys, "guest, a host that died", took_s)
    assert read_block(path, 0, BLOCK) == b"1" * BLOCK
    assert write_block(path, 0, b"2" * BLOCK) == 0
    a.link.heal()
    a.start()
    eventually(lambda: "which this daemon does not know" in a.said(), "the first host says who has the image")
    assert a.status("vol").state != "live"
    b.delete("vol")
    # The lock is free, and the clients of the first host's disk know data from before.
    eventually(lambda: "has served the image since" in a.said(), "the first host says why it does not serve")
    assert a.status("vol").state != "live"
    a.client.delete(None, force=True)
    with a.device("vol", "rbd", options=given) as again:
        assert again.path is not None and read_block(again.path, 0, BLOCK) == b"2" * BLOCK
