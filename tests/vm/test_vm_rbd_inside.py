"""The backend rbd inside a device's worker (isolation none): killed workers, a cluster away, an excluded client.

And an image that grows.
"""

import json
import re
from collections.abc import Iterator

import pytest

from support.ceph.cluster import POOL, Cluster, Shape
from support.ceph.serving import let_workers_read, options
from support.threads import names_of
from support.vm.daemon import Daemon, eventually, marked_processes
from support.vm.process import Forked, disk_bytes, read_block, write_block
from support.vm.recovery import kill_worker, loaded, seeded, wait_for_epoch
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.status import DeviceStatus

pytestmark = [pytest.mark.one_kernel("7.3"), pytest.mark.long]
BLOCK = 4096
FIRST_BYTES = 32 << 20
KILLS = 5


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    shape = Shape(
        stores=("memstore",), replicas=1, network=True, settings={"mon_allow_pool_size_one": "true"}
    )
    with Cluster(tmp_path_factory.mktemp("ceph") / "cluster", shape) as cluster:
        let_workers_read(cluster)
        yield cluster


def _add(daemon: Daemon, cluster: Cluster, image: str) -> DeviceStatus:
    return daemon.add(image, "rbd", options(cluster, image), isolation="none")


def _image(cluster: Cluster, name: str) -> None:
    cluster.rbd("create", "--size", "32M", f"{POOL}/{name}")


def _clients(cluster: Cluster, image: str) -> list[str]:
    """The addresses of those that have the image open for writing."""
    return re.findall(r"watcher=(\S+)", cluster.rbd("status", f"{POOL}/{image}"))


def test_killed_workers_and_a_killed_daemon_cost_the_client_nothing(daemon: Daemon, cluster: Cluster) -> None:
    _image(cluster, "killed")
    status = _add(daemon, cluster, "killed")
    assert (status.isolation, status.backend.kind, status.backend.pid) == ("none", "rbd", None)
    assert not [words for words in marked_processes(str(daemon.run_dir)).values() if " backend " in words]
    assert "io_context_pool" in names_of(status.workers[0].pid), "librbd runs in the worker"
    with seeded() as rng, loaded(daemon, [status]) as loads:
        for _ in range(KILLS):
            before = kill_worker(daemon, "killed", rng)
            wait_for_epoch(daemon, "killed", before.epoch + 1)
            loads[0].goes_on()
        daemon.crash()
        daemon.start()
        assert daemon.status("killed").epoch == before.epoch + 1, "the next daemon goes on with the worker"
        loads[0].goes_on()
        before = kill_worker(daemon, "killed", rng)
        wait_for_epoch(daemon, "killed", before.epoch + 1)
    assert daemon.said().count("taking over from the predecessor") >= KILLS + 1
    # The lock is given back at the end: nothing of the image is left to be waited for.
    assert cluster.rbd("lock", "ls", f"{POOL}/killed") == ""


def test_the_device_follows_an_image_that_grows(daemon: Daemon, cluster: Cluster) -> None:
    _image(cluster, "grows")
    status = _add(daemon, cluster, "grows")
    path = status.path
    assert path is not None and write_block(path, FIRST_BYTES - BLOCK, b"1" * BLOCK) == 0
    cluster.rbd("resize", "--size", "64M", f"{POOL}/grows")
    eventually(lambda: disk_bytes(path) == 2 * FIRST_BYTES, "the disk has grown")
    assert write_block(path, 2 * FIRST_BYTES - BLOCK, b"2" * BLOCK) == 0
    result = daemon.client.resize("grows", 3 * FIRST_BYTES)
    assert (result.before_bytes, result.after_bytes) == (2 * FIRST_BYTES, 3 * FIRST_BYTES)
    assert disk_bytes(path) == 3 * FIRST_BYTES
    assert json.loads(cluster.rbd("info", "--format", "json", f"{POOL}/grows"))["size"] == 3 * FIRST_BYTES
    assert write_block(path, 3 * FIRST_BYTES - BLOCK, b"3" * BLOCK) == 0
    # The worker of the next epoch, and one that a next daemon finds, serve it, too, and follow it further.
    with seeded() as rng:
        kill_worker(daemon, "grows", rng)
    wait_for_epoch(daemon, "grows", 2)
    daemon.crash()
    daemon.start()
    cluster.rbd("resize", "--size", "128M", f"{POOL}/grows")
    eventually(lambda: disk_bytes(path) == 4 * FIRST_BYTES, "the disk has grown under the next daemon")
    for number in (1, 2, 3):
        assert read_block(path, number * FIRST_BYTES - BLOCK, BLOCK) == b"%d" % number * BLOCK
    assert write_block(path, 4 * FIRST_BYTES - BLOCK, b"4" * BLOCK) == 0
    daemon.delete("grows")


def test_the_device_follows_a_resize_that_the_cluster_delayed_past_the_command(
    daemon: Daemon, cluster: Cluster
) -> None:
    _image(cluster, "late")
    path = _add(daemon, cluster, "late").path
    assert path is not None and write_block(path, 0, b"1" * BLOCK) == 0
    cluster.cut()
    try:
        with pytest.raises(DaemonError, match="has not grown within 60 s: once it has, the device follows"):
            daemon.client.resize("late", 2 * FIRST_BYTES)
        assert disk_bytes(path) == FIRST_BYTES
    finally:
        cluster.heal()
    eventually(lambda: disk_bytes(path) == 2 * FIRST_BYTES, "the disk has grown")
    assert write_block(path, 2 * FIRST_BYTES - BLOCK, b"2" * BLOCK) == 0
    daemon.delete("late")


def test_requests_wait_for_a_cluster_that_is_away_also_over_the_death_of_the_worker(
    daemon: Daemon, cluster: Cluster
) -> None:
    _image(cluster, "away")
    status = _add(daemon, cluster, "away")
    assert status.path is not None and write_block(status.path, BLOCK, b"1" * BLOCK) == 0
    cluster.cut()
    path = status.path
    with Forked(lambda: write_block(path, 2 * BLOCK, b"2" * BLOCK)) as late:
        eventually(lambda: any(each.in_flight for each in daemon.stats("away").queues), "a write waits")
        with seeded() as rng:
            kill_worker(daemon, "away", rng)
        eventually(lambda: "its store cannot be opened" in daemon.status("away").reason, "its list says why")
        assert daemon.status("away").state == "recovering" and late.running
        cluster.heal()
        wait_for_epoch(daemon, "away", 2)
        assert late.wait() == 0
    assert read_block(path, BLOCK, 2 * BLOCK) == b"1" * BLOCK + b"2" * BLOCK
    daemon.delete("away")


def test_a_worker_whose_client_is_excluded_ends_its_device_with_that_reason(
    daemon: Daemon, cluster: Cluster
) -> None:
    _image(cluster, "taken")
    status = _add(daemon, cluster, "taken")
    assert status.path is not None and write_block(status.path, 0, b"1" * BLOCK) == 0
    [address] = _clients(cluster, "taken")
    # Its answer is no JSON.
    cluster.commands({"prefix": "osd blocklist", "blocklistop": "add", "addr": address})
    eventually(lambda: daemon.status("taken").state == "failed", "the device fails")
    assert "another client has taken the" in daemon.status("taken").reason
    daemon.client.delete(["taken"], force=True)
    # A new client is not excluded.
    again = _add(daemon, cluster, "taken")
    assert again.path is not None and read_block(again.path, 0, BLOCK) == b"1" * BLOCK
    daemon.delete("taken")


def test_what_cannot_be_served_is_said_at_the_command(daemon: Daemon, cluster: Cluster) -> None:
    for change, reason in (
        ({"image": "none"}, "no such image"),
        ({"id": "nobody"}, "check conf=, id= and the keyring"),
    ):
        with pytest.raises(DaemonError, match=reason):
            daemon.add("bad", "rbd", options(cluster, "bad") | change, isolation="none")
