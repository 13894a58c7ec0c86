"""The cluster for tests: it serves, goes on without an OSD, and leaves nothing when it is stopped."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.ceph.cluster import CLIENT, POOL, Cluster, ClusterError, Shape
from support.ceph.servers import NoServer


def _command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "support.ceph", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)


def _processes_of(directory: Path) -> list[str]:
    """The command lines that name the directory."""
    found = []
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = each.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(directory) in line:
            found.append(line)
    return found


def test_a_cluster_goes_on_without_an_osd_takes_it_back_and_leaves_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "cluster"
    with Cluster(directory, Shape(stores=("memstore", "memstore"))) as cluster:
        cluster.rados("put", "-p", POOL, "before", "-", client=CLIENT, text="kept")
        assert len(_processes_of(directory)) == 3

        # By the command, as another process does it.
        assert _command("kill", "osd.0", directory).returncode == 0
        assert cluster.servers.alive() == ["mon.a", "osd.1"]
        cluster.wait_until_up(1)
        cluster.rados("put", "-p", POOL, "during", "-", client=CLIENT, text="without osd.0")
        assert cluster.rados("get", "-p", POOL, "before", "-") == "kept"

        assert cluster.rados("get", "-p", POOL, "during", "-") == "without osd.0"

        cluster.revive("osd.0")
        cluster.wait_until_up(2)
        assert cluster.rados("get", "-p", POOL, "before", "-") == "kept"
    assert _processes_of(directory) == []
    assert not directory.exists()


def test_a_cluster_of_the_command_outlives_it_and_is_stopped_by_another(tmp_path: Path) -> None:
    directory = tmp_path / "cluster"
    started = _command("start", "--osds", "1", "--replicas", "1", directory)
    try:
        assert started.stdout == f"conf={directory}/ceph.conf id={CLIENT} pool={POOL}\n", started.stderr
        assert "running: mon.a osd.0" in _command("status", directory).stdout
        refused = _command("kill", "osd.7", directory)
        assert (refused.returncode, refused.stderr) == (
            1,
            "support.ceph: osd.7 was not started; these were: mon.a osd.0\n",
        )
    finally:
        assert _command("stop", directory).returncode == 0
    assert _processes_of(directory) == []
    assert not directory.exists()


def test_a_client_needs_its_key_and_has_no_more_rights_than_its_caps(ceph: Cluster) -> None:
    ceph.rbd("create", f"{POOL}/image", "--size", "1M", client=CLIENT)
    assert "image" in ceph.rbd("ls", POOL, client=CLIENT).split()
    ceph.add_client("reader", {"mon": "profile rbd", "osd": f"profile rbd-read-only pool={POOL}"})
    assert "image" in ceph.rbd("ls", POOL, client="reader").split()
    with pytest.raises(ClusterError, match="not permitted"):
        ceph.rbd("rm", f"{POOL}/image", client="reader")
    with pytest.raises(ClusterError):
        ceph.rbd("ls", POOL, client="nobody")


def test_no_server_is_killed_under_the_name_of_one_that_ended(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "cluster")
    with pytest.raises(NoServer):
        cluster.kill("osd.0")
