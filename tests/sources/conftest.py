"""Tests of backends against real servers, which each test starts; the sanitized run leaves this folder out."""

from collections.abc import Iterator

import pytest

from support.ceph.cluster import Cluster


@pytest.fixture(scope="session")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster with its pool, for tests that leave its servers alone; each makes images of its own."""
    with Cluster(tmp_path_factory.mktemp("ceph") / "cluster") as cluster:
        yield cluster
