"""Every way a write can come, on every number of queues, verified byte by byte on the real driver."""

from collections.abc import Mapping
from typing import NamedTuple

import pytest

from support.vm_daemon import Daemon, total
from support.vm_fio import queue_cpus, run_fio
from ublkpool.daemon.status import DeviceStats

MIB = 1 << 20
DEPTH_TOTAL = 64
TROUBLE = (
    "errors",
    "violations",
    "requeues",
    "timeouts",
    "rescues",
    "replays",
    "unsupported",
    "stale_answers",
)


class Way(NamedTuple):
    """How a write comes to the backend."""

    need_get_data: bool
    placement: str

    def __str__(self) -> str:
        return self.placement if self.need_get_data else "off"


WAYS = (Way(False, "pool"), Way(True, "pool"), Way(True, "backend"))


def _options(daemon: Daemon, backend: str, way: Way) -> Mapping[str, object]:
    placement = {"placement": way.placement}
    if backend == "file":
        return {"path": daemon.path("disk.img"), "size": "64M", "segment": "32M", **placement}
    return {"size": "64M", **placement}


def _assert_unharmed(stats: DeviceStats) -> None:
    assert {name: total(stats, name) for name in TROUBLE} == dict.fromkeys(TROUBLE, 0)
    assert total(stats, "own_copy_bytes") == 0


@pytest.mark.parametrize("queues", [1, 2, 4])
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("backend", ["memory", "file"])
def test_what_fio_wrote_comes_back_over_every_queue(
    daemon: Daemon, backend: str, way: Way, queues: int
) -> None:
    config = {"queues": queues, "need_get_data": way.need_get_data, "placement": way.placement}
    options = _options(daemon, backend, way)
    with daemon.device("matrix", backend, options=options, **config) as status:
        assert status.path is not None and status.queues == queues
        written = run_fio(
            status.path,
            jobs=queues,
            cpus=queue_cpus(status.path, queues),
            size=16 * MIB // queues,
            iodepth=DEPTH_TOTAL // queues,
        ).written_bytes
        stats = daemon.rest("matrix")
        assert written == total(stats, "kernel_write_bytes") == sum(each.bytes.write for each in stats.queues)
        assert all(each.requests.write and each.requests.read for each in stats.queues)
        _assert_unharmed(stats)
    daemon.path("disk.img").unlink(missing_ok=True)
