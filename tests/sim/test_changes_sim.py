"""Seeded runs of a device whose settings change while its processes die: workers and record never disagree for long."""

import asyncio
import random
from collections import Counter

from sim.test_device_sim import scenario
from support.sim import play as sim_play
from support.sim.daemon import LeftBehind
from support.sim.device_world import DeviceWorld
from support.sim.processes import IO_TIMEOUT_S, DeviceScenario
from support.sim.wire import Killed
from ublkpool.daemon.device.team import _deadlines
from ublkpool.daemon.errors import DaemonError

SETS_MAX = 12
RUNS = 40


class ChangingWorld(DeviceWorld):
    """A run in which a client sets `io_timeout` again and again, each time to a value of its own."""

    def __init__(self, scenario: DeviceScenario, rng: random.Random) -> None:
        super().__init__(scenario, rng)
        self._actions = (*self._actions, (self._set, 2))
        self._value_s = IO_TIMEOUT_S
        self._changing: asyncio.Task[None] | None = None
        """The last change, which ends after all others of this supervisor."""
        self._possible = {IO_TIMEOUT_S}
        """The last value that a client was told of, and those that were asked for since."""

    def _set(self) -> None:
        daemon = self.daemon
        if daemon is None or self.ending or self.adopting is not None or self.counts["sets"] >= SETS_MAX:
            return
        device = daemon.device
        # A recovery is short: by chance alone few values would be set in one.
        if device.state == "waiting" or (device.state == "live" and self.rng.random() > 0.1):
            return
        self._value_s += 1
        value_s = self._value_s
        self.counts["sets"] += 1
        self.counts["sets in a recovery"] += device.state == "recovering"
        self._possible.add(value_s)
        self.note(f"client: set io_timeout={value_s:g}")

        async def change() -> None:
            try:
                await device.set({"io_timeout": value_s})
            except Killed:
                return
            except DaemonError as error:
                self.note(f"io_timeout={value_s:g} is refused: {error}")
                self.counts["sets refused"] += 1
                return
            self.counts["sets done"] += 1
            # Those that were asked for later come later, since each waits for its turn.
            self._possible = {each for each in self._possible if each >= value_s}
            for worker in self.workers:
                if worker.life.alive and worker.task.epoch == device.parts.resources.epoch:
                    assert worker.queue.deadlines[0] >= 1000 * value_s, f"{worker.task} has an older value"

        self._changing = daemon.spawn(change)

    def _save(self, left: LeftBehind) -> None:
        before = self.left
        super()._save(left)
        is_change = before is not None and before.config is not left.config
        if is_change and "supervisor" in self.kills and self.rng.random() < 0.5:
            self.note(f"the supervisor dies after it has recorded io_timeout={left.config.io_timeout_s:g}")
            self.counts["supervisor killed in a change"] += 1
            self.kills.remove("supervisor")
            self._died_in_fork = True
            raise Killed

    def _kill_supervisor(self) -> None:
        super()._kill_supervisor()
        self._changing = None

    def _is_settled(self) -> bool:
        return super()._is_settled() and (self._changing is None or self._changing.done())

    def _check_buffers_at_rest(self) -> None:
        super()._check_buffers_at_rest()
        assert self.daemon is not None
        config = self.daemon.device.config
        assert config.io_timeout_s in self._possible, f"{config.io_timeout_s:g} of {self._possible}"
        for worker in self.workers:
            assert worker.queue.deadlines == _deadlines(config), f"{worker.task} disagrees with the record"


def test_after_any_deaths_every_worker_has_the_settings_that_the_client_was_told_of() -> None:
    reached = Counter[str]()
    for seed in range(RUNS):
        reached.update(sim_play.play(seed, scenario, ChangingWorld).counts)
    corners = ("sets in a recovery", "supervisor killed in a change", "worker killed")
    assert reached["sets done"] > 2 * RUNS and min(reached[each] for each in corners) > 1, reached
