"""The settings of librbd and librados that the backend rbd has by itself, and what goes before them."""

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from support.ceph.cluster import CLIENT, POOL, Cluster
from support.ceph.serving import host
from support.threads import names_of
from ublkpool.backends.rbd.cluster import LEAN
from ublkpool.backends.rbd.cluster import Cluster as Client
from ublkpool.backends.rbd.options import RbdOptions
from ublkpool.bufpool.wire import Op


def settings_of_a_client(conf: Path, defaults: Mapping[str, str]) -> dict[str, str]:
    """What a client that is given these defaults has for each setting of `LEAN`."""
    client = Client(RbdOptions(pool=POOL, image="", conf=conf, id=CLIENT), defaults=defaults)
    try:
        return {key: client.setting(key) for key in LEAN}
    finally:
        client.close()


def test_our_defaults_give_way_to_the_configuration_and_to_the_clusters(
    ceph: Cluster, tmp_path: Path
) -> None:
    cephs = settings_of_a_client(ceph.conf, {})
    assert settings_of_a_client(ceph.conf, LEAN) == LEAN
    assert all(cephs[key] != value for key, value in LEAN.items()), "each of them changes something"
    # The user has set a value that is Ceph's default: it counts as set.
    own = tmp_path / "own.conf"
    line = f"librados_thread_count = {cephs['librados_thread_count']}"
    own.write_text(ceph.conf.read_text() + f"[client]\n{line}\n")
    there = {"who": "client", "name": "rbd_non_blocking_aio"}
    ceph.commands({"prefix": "config set", **there, "value": cephs["rbd_non_blocking_aio"]})
    try:
        found = settings_of_a_client(own, LEAN)
        assert found == {**cephs, "rbd_io_scheduler": LEAN["rbd_io_scheduler"]}
    finally:
        ceph.commands({"prefix": "config rm", **there})


@pytest.mark.parametrize(("given", "threads"), [("off", 1), ("on", 2)])
def test_one_thread_of_librados_answers_unless_cephs_defaults_are_to_be_kept(
    ceph: Cluster, tmp_path: Path, given: str, threads: int
) -> None:
    data, image = os.urandom(4096), f"settings-{given}"
    ceph.rbd("create", "--size", "16M", f"{POOL}/{image}")
    with host(tmp_path / "a", ceph, image, ceph_defaults=given) as a:
        a.serve()
        assert a.process is not None
        assert names_of(a.process.pid).count("io_context_pool") == threads
        assert a.worker.write(0, data) == len(data) and a.worker.read(0, len(data)) == data
        a.stop()


def test_a_discard_is_a_request_to_a_few_hundred_objects_at_most(ceph: Cluster, tmp_path: Path) -> None:
    ceph.rbd("create", "--size", "64M", "--object-size", "64K", f"{POOL}/small")
    with host(tmp_path / "a", ceph, "small") as a:
        attach = a.serve()
        assert attach.discard_max_bytes == attach.write_zeroes_max_bytes == 256 * (64 << 10)
        assert a.worker.write(0, b"x" * 4096) == 4096
        assert a.worker.do(Op.DISCARD, 0, attach.discard_max_bytes) == 0
        assert a.worker.read(0, 4096) == bytes(4096)
        a.stop()
