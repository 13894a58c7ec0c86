"""Seeded runs of a device that is drained and resumed while its processes die."""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from sim.test_device_sim import scenario
from support.sim import play as sim_play
from support.sim.device_world import DeviceWorld
from support.sim.processes import DeviceScenario, Victim
from support.sim.wire import Killed
from ublkpool.daemon.errors import DaemonError

RUNS = 40
DRAINS_MAX = 6
CORNERS = (
    "resume done",
    "drain failed",
    "given up",
    "worker killed while drained",
    "broker killed while drained",
    "supervisors of a drained device",
)


class DrainingWorld(DeviceWorld):
    """A run in which a client drains the device, gives some drains up, and resumes it."""

    def __init__(self, scenario: DeviceScenario, rng: random.Random) -> None:
        super().__init__(scenario, rng)
        self._actions = (*self._actions, (self._maintain, 8))
        self._asking: asyncio.Task[Any] | None = None
        self.is_drained = False
        """Whether a client was told so, and has not asked for a resume since."""

    def _maintain(self) -> None:
        daemon = self.daemon
        if daemon is None or self.adopting is not None or daemon.device.state == "waiting" or self.deleting:
            return
        is_asking = self._asking is not None and not self._asking.done()
        assert not self.is_drained or daemon.device.parts.drain == "drained", (
            "the supervisor has forgotten it"
        )
        if self._asking is not None and is_asking:
            if not self.ending and self.rng.random() < 0.005:
                self.note("client: gives up")
                self.counts["given up"] += 1
                self._asking.cancel()
        elif daemon.device.parts.drain == "drained":
            if self.is_drained and not self.ending and self.rng.random() < 0.02:
                self._kill_supervisor()
            elif self.ending or self.rng.random() < 0.05:
                self.is_drained = False
                self._ask("resume", daemon.device.resume)
        elif not self.ending and self.counts["drain"] < DRAINS_MAX and self.rng.random() < 0.4:
            device, flush = daemon.device, self.rng.random() < 0.7
            self._ask("drain", lambda: device.drain(flush, None))

    def _ask(self, what: str, work: Callable[[], Awaitable[None]]) -> None:
        daemon = self.daemon
        assert daemon is not None
        self.note(f"client: {what}")
        self.counts[what] += 1

        async def ask() -> None:
            try:
                await work()
            except Killed:
                return
            except DaemonError as error:
                self.note(f"{what} fails: {error}")
                self.counts[f"{what} failed"] += 1
                return
            self.note(f"{what} is done")
            self.counts[f"{what} done"] += 1
            self.is_drained = what == "drain"

        self._asking = daemon.spawn(ask)

    def _kill_supervisor(self) -> None:
        super()._kill_supervisor()
        self.counts["supervisors of a drained device"] += self.is_drained
        self._asking = None

    def _kill(self) -> None:
        # A device is drained for a short time: by chance alone little would die in it.
        for _ in range(1 + 4 * self.is_drained):
            super()._kill()

    def _has_killed(self, victim: Victim) -> bool:
        was_killed = super()._has_killed(victim)
        self.counts[f"{victim} killed while drained"] += was_killed and self.is_drained
        return was_killed

    def check(self) -> None:
        super().check()
        if not self.is_drained:
            return
        assert self.backend is None or self.backend.attachment is None, "a drained device has a backend"
        if self.daemon is not None and self.adopting is None:
            assert self.daemon.device.parts.drain == "drained", "the next supervisor has forgotten it"


def test_a_drained_device_stays_so_whatever_dies_and_no_request_is_lost_or_late() -> None:
    reached = Counter[str]()
    for seed in range(RUNS):
        changes: dict[str, Any] = {} if seed % 2 else {"kills": ("supervisor", "worker", "broker") * 2}
        reached.update(sim_play.play(seed, scenario, DrainingWorld, **changes).counts)
    assert min(reached[each] for each in CORNERS) > 0 and reached["drain done"] > RUNS / 2, reached
