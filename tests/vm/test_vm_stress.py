"""Many jobs of every kind on four deep queues at once, verified.  UBLKPOOL_STRESS_S makes it longer."""

import os

import pytest

from support.vm.daemon import Daemon, total
from support.vm.fio import finish_fio, start_fio_jobs

MIB = 1 << 20
SECONDS = int(os.environ.get("UBLKPOOL_STRESS_S", "40"))
VERIFIED = {"verify": "crc32c", "verify_fatal": 1, "verify_backlog": 64, "verify_state_save": 0}
JOBS: dict[str, dict[str, object]] = {
    "mixed1": {"rw": "randrw", **VERIFIED},
    "mixed2": {"rw": "randrw", "rwmixread": 20, **VERIFIED},
    "small": {"rw": "randwrite", "bssplit": "512/50:4k/50", **VERIFIED},
    "large": {"rw": "write", "bssplit": "512k/50:300k/50", "iodepth": 8, **VERIFIED},
    "synced": {"rw": "randwrite", "bssplit": "4k/100", "fsync": 16, "iodepth": 16, **VERIFIED},
    "durable": {"rw": "randwrite", "bssplit": "4k/50:16k/50", "sync": "dsync", "iodepth": 16, **VERIFIED},
    "trims": {"rw": "randtrim", "bssplit": "4k/50:256k/50"},
    "rewrites": {"rw": "trimwrite", "bssplit": "64k/100"},
}


@pytest.mark.one_kernel("7.3")
def test_eight_jobs_of_every_kind_on_four_queues_agree_with_what_they_wrote(daemon: Daemon) -> None:
    disk = daemon.path("stress.img")
    options = {"path": disk, "size": "256M"}
    with daemon.device("stress", "file", options=options, queues=4, depth=128) as status:
        assert status.path is not None
        result = finish_fio(
            start_fio_jobs(status.path, JOBS, 32 * MIB, iodepth=64, time_based=1, runtime=SECONDS)
        )
        assert result.written_bytes and result.read_bytes and result.trimmed_bytes
        stats = daemon.rest("stress")
        assert all(queue.requests.write and queue.requests.read for queue in stats.queues)
        assert total(stats, "in_flight_max") > 64
        assert sum(queue.requests.flush for queue in stats.queues)
        assert sum(queue.requests.discard for queue in stats.queues)
        for counter in ("errors", "violations", "requeues", "timeouts", "own_copy_bytes", "unsupported"):
            assert total(stats, counter) == 0, counter
        assert total(stats, "kernel_write_bytes") == result.written_bytes
    disk.unlink()
