"""An image of a cluster and two hosts, each in a network namespace: one takes over from the other on command."""

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from support.ceph.cluster import POOL, Cluster, Shape
from support.ceph.network import OtherHost
from support.ceph.serving import Host, host, said
from support.fakes.worker import finish
from ublkpool.bufpool import wire
from ublkpool.bufpool.wire import Kind, Op

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes a network")
BLOCK = 4096
TAGS = range(16)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    shape = Shape(
        stores=("memstore",), replicas=1, network=True, settings={"mon_allow_pool_size_one": "true"}
    )
    with Cluster(tmp_path_factory.mktemp("ceph") / "cluster", shape) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def links(cluster: Cluster) -> Iterator[tuple[OtherHost, OtherHost]]:
    """The two hosts' networks."""
    with cluster.host(1) as a, cluster.host(2) as b:
        yield a, b


@pytest.fixture
def pair(
    cluster: Cluster, links: tuple[OtherHost, OtherHost], tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[tuple[Host, Host]]:
    """Both hosts for a new image."""
    name = f"i{abs(hash(request.node.nodeid)) % 10**8}"
    cluster.rbd("create", "--size", "16M", f"{POOL}/{name}")
    with ExitStack() as stack:
        made = [stack.enter_context(host(tmp_path / link.name, cluster, name, link.prefix)) for link in links]
        yield made[0], made[1]
        for link in links:
            link.heal()


def block(number: int, tag: int) -> bytes:
    return (number << 32 | tag).to_bytes(8, "big") * (BLOCK // 8)


def begin(of: Host, number: int) -> None:
    """Send a write with each tag, of its own block."""
    requests = []
    for tag in TAGS:
        request = of.worker.describe(Kind.REQUEST, Op.WRITE, tag * BLOCK, BLOCK, tag=tag)
        of.worker.pool[request.buffer : request.buffer + BLOCK] = block(number, tag)
        requests.append(request)
    of.worker.send(0, requests)


def write(of: Host, number: int) -> None:
    begin(of, number)
    for _ in TAGS:
        answer = of.worker.receive()
        assert (answer.kind, answer.result) == (Kind.DONE, BLOCK)


def judge(of: Host, number: int) -> None:
    for tag in TAGS:
        assert of.worker.read(tag * BLOCK, BLOCK, tag=tag) == block(number, tag), tag


def take_over(b: Host) -> float:
    """On the operator's word; how many seconds later the first write is answered."""
    b.takes_over = True
    began_s = time.monotonic()
    b.serve()
    assert b.worker.write(len(TAGS) * BLOCK, block(0, 0)) == BLOCK
    return time.monotonic() - began_s


def report(capsys: pytest.CaptureFixture[str], what: str, took_s: float) -> None:
    with capsys.disabled():
        print(f"\nrbd: {what}: first write {took_s:.2f} s after the command")


def test_a_host_that_was_cut_off_with_writes_in_flight_changes_nothing_after_another_took_over(
    pair: tuple[Host, Host], links: tuple[OtherHost, OtherHost], capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = pair
    a.serve()
    write(a, 1)
    links[0].cut()
    begin(a, 2)
    assert a.worker.is_silent(for_s=1)
    report(capsys, "a host that is cut off", take_over(b))
    judge(b, 1)
    write(b, 3)
    assert a.process is not None and a.process.poll() is None and a.worker.is_silent(), "still in flight"
    links[0].heal()
    excluded = said(a.worker)
    assert isinstance(excluded, wire.Excluded) and "another client has taken the" in excluded.reason
    status, log = finish(a.process)
    assert status != 0 and "blocklisted" in log
    assert a.worker.is_silent(), "no late write was answered"
    judge(b, 3)
    b.stop()
    # The host comes back, with a disk whose clients know what they wrote.
    again = a.start()
    a.worker.described = {**a.worker.described, "path": "/dev/ublkb0"}
    a.worker.answer_question()
    status, log = finish(again)
    assert status != 0 and f"{b.owner} has served the image since" in log


def test_a_host_that_is_gone_is_followed_on_command(
    pair: tuple[Host, Host], links: tuple[OtherHost, OtherHost], capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = pair
    a.serve()
    write(a, 1)
    begin(a, 2)
    # So that the cluster does not notice the end of its connections.
    links[0].cut()
    a.kill()
    report(capsys, "a host that is gone", take_over(b))
    for tag in TAGS:
        # Those that were in flight have reached the cluster or not.
        assert b.worker.read(tag * BLOCK, BLOCK, tag=tag) in (block(1, tag), block(2, tag))
    write(b, 3)
    links[0].heal()
    judge(b, 3)
    b.stop()
