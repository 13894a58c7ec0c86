"""Seeded runs of a device that is drained and resumed while its processes die."""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from sim.test_device_sim import scenario
from support.sim import play as sim_play
from support.sim.daemon import LeftBehind
from support.sim.device_world import DeviceWorld
from support.sim.processes import DeviceScenario, Victim
from support.sim.wire import Killed
from ublkpool.daemon.errors import DaemonError

RUNS = 40
DRAINS_MAX = 6
RECORD, GATE = "the record", "the gate's opening"
DEATHS = tuple((when, step) for step in (RECORD, GATE) for when in ("before", "after"))
DEATHS_MIN = 3
DYING_RUNS_MAX = 200
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
        self._has_let_go = False
        """Whether the workers of a device that is drained on record have let its requests go on."""

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
        if self.daemon is None and self.left is not None:
            self._check_orphans(self.left)
        elif self.daemon is not None and self.adopting is None and self._has_let_go:
            self._has_let_go = False
            assert self.daemon.device.parts.drain != "drained", "a device that was served again is drained"
        if not self.is_drained:
            return
        assert self.backend is None or self.backend.attachment is None, "a drained device has a backend"
        if self.daemon is not None and self.adopting is None:
            assert self.daemon.device.parts.drain == "drained", "the next supervisor has forgotten it"

    def _check_orphans(self, left: LeftBehind) -> None:
        """Without a supervisor a device is drained, on record and in every worker, or its requests go on."""
        holds = {each.will_hold() for each in left.workers if each.life.alive}
        assert len(holds) < 2, "some workers hold and others do not"
        if left.drained and not left.drain_is_open:
            assert holds <= {True}, "a drained device is served"
        elif not left.drained and self.backend is not None and self.backend.attachment is not None:
            assert holds <= {False}, "requests wait for the next supervisor"
        self._has_let_go = left.drain_is_open and holds == {False}
        self.counts["let go"] += self._has_let_go
        self.counts["held"] += left.drain_is_open and holds == {True}


class DyingWorld(DrainingWorld):
    """A run in which the supervisor dies while it drains the device, at each step of putting that on record."""

    def __init__(self, scenario: DeviceScenario, rng: random.Random) -> None:
        super().__init__(scenario, rng)
        self._dies_at: tuple[str, str] | None = rng.choice(DEATHS)

    def _maintain(self) -> None:
        daemon = self.daemon
        is_draining = daemon is not None and daemon.device.parts.drain == "draining"
        if is_draining and self.adopting is None and not self.ending and self.rng.random() < 0.005:
            self._kill_supervisor()
            self.counts["killed while draining"] += 1
        else:
            super()._maintain()

    def _save(self, left: LeftBehind) -> None:
        before = self.left
        is_new = left.drained and (before is None or not before.drained or before.drain_is_open)
        may_die = self.adopting is None and not (self.ending or self.deleting or self._died_in_fork)
        when, step = self._dies_at or ("", "")
        if not is_new or not may_die or step != (RECORD if left.drain_is_open else GATE):
            super()._save(left)
            return
        self._dies_at = None
        if when == "after":
            super()._save(left)
        self.counts[f"killed {when} {step}"] += 1
        self._died_in_fork = True
        raise Killed


def test_a_drained_device_stays_so_whatever_dies_and_no_request_is_lost_or_late() -> None:
    reached = Counter[str]()
    for seed in range(RUNS):
        changes: dict[str, Any] = {} if seed % 2 else {"kills": ("supervisor", "worker", "broker") * 2}
        reached.update(sim_play.play(seed, scenario, DrainingWorld, **changes).counts)
    assert min(reached[each] for each in CORNERS) > 0 and reached["drain done"] > RUNS / 2, reached


def test_a_device_whose_supervisor_dies_on_the_way_is_drained_or_serves_without_one() -> None:
    reached = Counter[str]()
    corners = [f"killed {when} {step}" for when, step in DEATHS]
    corners += ["killed while draining", "let go", "held"]
    for seed in range(DYING_RUNS_MAX):
        changes: dict[str, Any] = {} if seed % 2 else {"kills": ()}
        reached.update(sim_play.play(seed, scenario, DyingWorld, **changes).counts)
        if min(reached[each] for each in corners) >= DEATHS_MIN:
            return
    raise AssertionError(f"no run has reached it: {reached}")
