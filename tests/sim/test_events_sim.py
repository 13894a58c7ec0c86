"""Seeded runs of a device that is recovered while its supervisor is killed: what its events say is what happened."""

import asyncio
import os
import random
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import pytest

from sim.test_device_sim import scenario
from support.sim import daemon as sim_daemon
from support.sim import play as sim_play
from support.sim.daemon import BrokerLife, Daemon, SimDeviceParts
from support.sim.device_world import DeviceWorld
from support.sim.processes import DeviceScenario, Victim
from ublkpool.daemon.events.event import Event, decode
from ublkpool.daemon.events.event_file import NAME, Append, load
from ublkpool.daemon.events.keeper import EventKeeper
from ublkpool.daemon.events.tell import Events
from ublkpool.daemon.plain_call import Call
from ublkpool.daemon.status import State

RUNS = 36
KILLS: tuple[Victim, ...] = ("supervisor", "worker", "backend", "supervisor", "worker")
BYTES_MAX = 1 << 20
BOOT_S = 1_795_707_865.0


class EventsWorld(DeviceWorld):
    """A run whose supervisors keep their events in one directory; a shadow sees each change of the device's state."""

    directory: Path

    def __init__(self, scenario: DeviceScenario, rng: random.Random) -> None:
        super().__init__(scenario, rng)
        self.own_rng = random.Random(rng.random())
        self.states: list[State] = []
        """Of this supervisor's device, each that differs from the one before."""
        self.events = Events()
        self._writing: Append | None = None
        self._first_seq = self._last_kept = 0
        for each in self.directory.iterdir():
            each.unlink()

    def _begin_daemon(self, broker: BrokerLife | None = None) -> Daemon:
        earlier = load(self.directory, BYTES_MAX)
        seqs = [each.seq for each in earlier]
        assert seqs == sorted(set(seqs)), "numbers do not rise in the file"
        assert not seqs or seqs[-1] >= self._last_kept, "the file has lost an event"
        self.events = Events(BYTES_MAX, earlier, self.clock, lambda: BOOT_S + self.clock.now_s)
        self._first_seq = seqs[-1] + 1 if seqs else 0
        self.states.clear()
        with patch.object(sim_daemon, "Events", lambda: self.events):
            daemon = super()._begin_daemon(broker)
        self.keeper = EventKeeper(self.events, self.directory, self, BYTES_MAX)
        daemon.spawn(self.keeper.keep)
        return daemon

    async def look(
        self,
        owner: str,
        what: str,
        work: Call,
        result: type[None],
        deadline_s: float = 0.0,
        *,
        title: str = "",
    ) -> None:
        """The process that writes takes a while."""
        assert isinstance(work.function, Append)
        self._writing = work.function
        for _ in range(self.own_rng.randrange(6)):
            await asyncio.sleep(0.01)
        work()
        self.counts["writes"] += 1
        self._writing = None
        self._last_kept = load(self.directory, BYTES_MAX)[-1].seq

    def note_state(self, state: State) -> None:
        if not self.states or self.states[-1] != state:
            self.states.append(state)

    def _kill_supervisor(self) -> None:
        self._check_life()
        if self._writing is not None:
            # Its writer ends with it, in the middle of the write.
            text = self._writing._text
            with (self.directory / NAME).open("ab") as file:
                file.write(text[: self.own_rng.randrange(len(text) + 1)])
            self.counts["supervisor killed in a write"] += 1
            self._writing = None
        super()._kill_supervisor()

    def own(self) -> list[Event]:
        """The events of this life."""
        lines = self.events.after(self._first_seq - 1 if self._first_seq else 0, most=10**6).lines
        return [event for line in lines if (event := decode(line.rstrip())) is not None]

    def _check_life(self) -> None:
        """Each recovery that the shadow saw has one beginning and one end, in turn; one may still run."""
        codes = [each.code for each in self.own() if each.code.startswith("recovery-")]
        begun = self.states.count("recovering")
        runs = bool(self.states) and self.states[-1] == "recovering"
        expected = ["recovery-begun", "recovery-ended"] * begun
        # The end is told after the state has changed, in the same turn of the loop.
        assert codes == (expected[:-1] if runs else expected), f"{self.states}: {codes}"
        self.counts["recoveries told"] += begun
        self.counts["recoveries cut short"] += runs
        for each in self.own():
            if each.code == "recovery-ended":
                self._check_end(each)

    def _check_end(self, event: Event) -> None:
        assert event.details["served"] and event.details["seconds"] >= 0, event
        replayed = event.details["replayed"]
        assert replayed is None or 0 <= replayed <= self.scenario.queues * self.scenario.depth, event
        self.counts["requests sent again"] += replayed or 0

    def _delete(self) -> None:
        super()._delete()
        self._check_life()
        daemon = self.daemon
        assert daemon is not None
        flushing = daemon.spawn(self.keeper.flush)
        self._until(lambda: bool(flushing.done()), "the events are never written")
        kept = [each.seq for each in load(self.directory, BYTES_MAX)]
        assert kept == sorted(set(kept)) and kept[-len(self.own()) :] == [each.seq for each in self.own()]
        codes = Counter(each.code for each in self.own())
        self.counts.update({code: count for code, count in codes.items() if code.startswith("backend-")})


def test_after_any_deaths_each_recovery_has_one_beginning_and_one_end_and_the_file_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EventsWorld, "directory", tmp_path, raising=False)
    monkeypatch.setattr(os, "fdatasync", lambda fd: None)
    worlds: list[EventsWorld] = []

    def world(scenario: DeviceScenario, rng: random.Random) -> EventsWorld:
        worlds.append(EventsWorld(scenario, rng))
        return worlds[-1]

    enter = SimDeviceParts.enter

    def entered(parts: SimDeviceParts, state: State) -> None:
        worlds[-1].note_state(state)
        enter(parts, state)

    monkeypatch.setattr(SimDeviceParts, "enter", entered)
    reached = Counter[str]()
    for seed in range(RUNS):
        reached.update(sim_play.play(seed, scenario, world, kills=KILLS).counts)
    assert reached["recoveries told"] > RUNS / 2 and reached["requests sent again"] > RUNS / 4, reached
    corners = ("recoveries cut short", "supervisor killed in a write", "backend-replaced", "backend-died")
    assert not (missing := [each for each in corners if not reached[each]]), (missing, reached)
