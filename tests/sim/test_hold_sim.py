"""Seeded runs of queues that are held again and again, flushed, and let go, while backends die."""

import errno
import random
from collections import Counter
from collections.abc import Iterator

from sim.test_queue_core_sim import SHAPES, scenario
from support.fakes.backend import Key
from support.sim import play as sim_play
from support.sim.queue_world import Scenario, World
from ublkpool.ublk.queue import Attention, LinkState


class HoldingWorld(World):
    """A run in which each queue is held at random moments; a backend has nothing of a queue that is quiet."""

    def __init__(self, scenario: Scenario, rng: random.Random) -> None:
        super().__init__(scenario, rng)
        self._actions = (*self._actions, (self._hold, 2), (self._watch, 6))
        self.quiet: set[int] = set()
        self.flushing: set[int] = set()
        self.counts = Counter[str]()

    def _hold(self, queue: int) -> None:
        on = self.rng.random() < 0.5 and not self.ending
        self.note(f"queue {queue}: {'held' if on else 'let go'}")
        self.rig.sides[queue].queue.hold(on)
        if not on:
            self.quiet.discard(queue)
            self.absent.discard(queue)

    def _watch(self, queue: int) -> None:
        core = self.rig.sides[queue].queue
        attention = core.attention()
        if attention & Attention.FLUSHED:
            core.clear(Attention.FLUSHED)
            self.flushing.remove(queue)
            assert core.flush_result() in (0, -errno.ENOTCONN)
            self.counts["flushed" if core.flush_result() == 0 else "flush lost"] += 1
        if attention & Attention.QUIET:
            core.clear(Attention.QUIET)
            self.counts["quiet"] += 1
            self.quiet.add(queue)
            if self.rng.random() < 0.7 and core.link is LinkState.UP:
                assert core.flush()
                self.flushing.add(queue)
        if queue in self.quiet and queue not in self.flushing and core.link is LinkState.UP:
            assert not list(self._had(queue)), f"the backend has {list(self._had(queue))}"

    def _had(self, queue: int) -> Iterator[Key]:
        if self.backend is not None:
            for had in (self.backend.given, self.backend.placing, self.backend.executed):
                yield from (key for key in had if key[0] == queue)

    def _execute(self, queue: int) -> None:
        if self.backend is not None:
            # An error is the client's; the queue's own FLUSH has none.
            self.backend.error_rate = 0.0
        super()._execute(queue)

    def _finish(self) -> None:
        if self.scenario.end != "given up":
            for side in self.rig.sides:
                side.queue.hold(False)
            self.quiet.clear()
        super()._finish()

    def _give_up(self) -> None:
        super()._give_up()
        self.quiet.clear()


def test_held_queues_lose_no_request_and_a_backend_has_nothing_of_a_quiet_one() -> None:
    reached = Counter[str]()
    for seed in range(2 * len(SHAPES)):
        if scenario(seed, random.Random(seed)).temper != "lying":
            reached.update(sim_play.play(seed, scenario, HoldingWorld).counts)
    assert min(reached[each] for each in ("quiet", "flushed", "flush lost")) > 5, reached
