"""Seeded runs of a device with limits whose processes die: the limits are never exceeded, and nothing is stuck."""

import random
from collections import Counter

import msgspec

from sim.test_device_sim import scenario
from support.fakes.driver import SECTOR_BYTES
from support.sim import play as sim_play
from support.sim.device_world import DeviceWorld
from support.sim.processes import MAX_IO_BYTES, DeviceScenario
from ublkpool.bufpool.wire import Op

RUNS = 48
IOPS, BYTES_PER_S = 40, 64 << 10
BATCH_S = 0.004


class LimitedWorld(DeviceWorld):
    """A run that counts what is answered."""

    answered_count, answered_bytes = 0, 0

    def _harvest(self) -> None:
        config = self.config
        for request in self.kernel.finished:
            if request.op != Op.FLUSH and (request.result or 0) >= 0 and not self.deleting:
                self.answered_count += 1
                is_data = request.op in (Op.READ, Op.WRITE)
                self.answered_bytes += request.sectors * SECTOR_BYTES if is_data else 0
        super()._harvest()
        if self.deleting:
            return
        queues = self.scenario.queues
        for_s = self.clock.now_s + config.burst_s + queues * BATCH_S
        more = queues + 1
        assert self.answered_count <= IOPS * for_s + more, f"{self.answered_count} in {for_s} s"
        if config.bytes_per_s_max:
            assert self.answered_bytes <= BYTES_PER_S * for_s + more * MAX_IO_BYTES, f"{self.answered_bytes}"

    def _check_buffers_at_rest(self) -> None:
        super()._check_buffers_at_rest()
        for worker in self.workers:
            assert worker.counter("limit_waiting") == 0
            self.counts["limited"] += worker.counter("limited")


def limited(seed: int, rng: random.Random) -> DeviceScenario:
    drawn = scenario(seed, rng)
    return msgspec.structs.replace(drawn, iops_max=IOPS, bytes_per_s_max=(0, BYTES_PER_S)[seed % 2])


def test_after_any_deaths_the_limits_were_never_exceeded_and_every_request_is_answered() -> None:
    reached = Counter[str]()
    for seed in range(0, RUNS * 7, 7):
        reached.update(sim_play.play(seed, limited, LimitedWorld).counts)
    assert reached["limited"] > 2 * RUNS, reached
    assert min(reached[f"{each} killed"] for each in ("worker", "backend", "broker", "supervisor")) > 3, (
        reached
    )
