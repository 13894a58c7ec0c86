"""A whole device in one random order of events that a seed decides: kernel, workers, broker, supervisor, backend.

Each step lets one party do one thing, or kills one in the middle of it.  `DeviceWorld.run` ends with every request
answered, every buffer accounted for, the store holding what was acknowledged last, and the device deleted.
"""

import logging
import random
import shutil
from collections.abc import Callable

from support.fakes.driver import SECTOR_BYTES, Request
from support.sim.daemon import patched
from support.sim.kernel import TagOwner, Task
from support.sim.processes import IO_TIMEOUT_S, MAX_IO_BYTES, SECTORS, DeviceScenario, Processes, Victim
from support.vm.shadow_disk import ShadowDisk
from ublkpool.bufpool.wire import Op
from ublkpool.ublk.queue import Attention

TURNS_TO_END_MAX = 3000
STEPS_TO_CHECK = 16
PAUSES_S = (60.0, 2 * IO_TIMEOUT_S, 86400.0)
LIVES_MAX = 5
"""Deaths of workers and brokers in one supervisor's life; after one more it may rightly give the device up."""


class DeviceWorld(Processes):
    """One run; every choice comes from `rng`."""

    def __init__(self, scenario: DeviceScenario, rng: random.Random) -> None:
        super().__init__(scenario, rng)
        block = scenario.block_bytes // SECTOR_BYTES
        self.disk = ShadowDisk(rng, 0, SECTORS, MAX_IO_BYTES // SECTOR_BYTES, block)
        self.may_fail: set[Request] = set()
        self.kills = list(scenario.kills)
        self._actions: tuple[tuple[Callable[[], None], int], ...] = (
            (self._submit, 6),
            (self._dispatch, 7),
            (self._copy, 5),
            (self._work, 14),
            (self._serve, 7),
            (self._execute, 10),
            (self._lease, 4),
            (self._supervise, 8),
            (self._connect, 3),
            (self._tick, 3),
            (self._driver, 3),
            (self._kill, 1),
        )

    # The run

    def run(self) -> None:
        """Play the scenario to its end.  Raises `AssertionError` for each broken promise."""
        logger = logging.getLogger("ublkpool")
        level, logger.level = logger.level, logging.CRITICAL + 1
        try:
            with patched(self._scenery):
                self._play()
        finally:
            logger.level = level
            self._clean_up()

    def _play(self) -> None:
        self._begin_daemon()
        if self.scenario.prepared:
            self._prepare()
        work, weights = zip(*self._actions, strict=True)
        self._until(self._is_live, "the device does not come up")
        if self.scenario.prepared:
            assert self.counts["epochs"] == 1, "the device was not made of the prepared one"
            self.counts["made of a prepared one"] += 1
        for action in self.rng.choices(work, weights, k=self.scenario.steps):
            self._do(action)
        self.ending = True
        self._until(lambda: not self._is_busy(), "a request is never answered")
        self._until(self._is_settled, "the broker and the workers do not settle")
        self._check_buffers_at_rest()
        for worker in self.workers:
            worker.check_durations()
        self.disk.check_stored(self.store.read)
        self.counts["pools replaced"] = sum(each.changes for each in self.witness.pools)
        self._delete()

    def _do(self, action: Callable[[], None]) -> None:
        self.step += 1
        action()
        if self.backend is not None and self.backend.complaint is not None:
            raise self.backend.complaint
        self._harvest()
        if self.step % STEPS_TO_CHECK == 0:
            self.check()

    def _until(self, done: Callable[[], bool], complaint: str) -> None:
        often = (self._dispatch, self._copy, self._work, self._execute, self._supervise)
        work = [action for action, _ in self._actions if action not in (self._kill, self._submit, *often)]
        for _ in range(TURNS_TO_END_MAX):
            for action in (*work, *often * self.scenario.queues):
                self._do(action)
            if done():
                return
        state = self.daemon.device.state if self.daemon else "no daemon"
        raise AssertionError(f"{complaint}: {state}, {self.kernel.state.name}, {self._stuck()}")

    def _stuck(self) -> list[str]:
        return [
            f"{tag.owner.name} {tag.request}"
            for queue in self.kernel.queues
            for tag in queue.tags
            if tag.request
        ] + [f"waits {request}" for queue in self.kernel.queues for request in queue.waiting]

    def _is_live(self) -> bool:
        return self.daemon is not None and self.daemon.device.state == "live"

    def _is_busy(self) -> bool:
        return bool(self.kernel.outstanding) or not self._is_live() or self.backend is None

    def _is_settled(self) -> bool:
        talking = any(each.inbox or each.outbox for each in self.dealers)
        wants = any(each.queue.attention() & Attention.STOCK for each in self.workers)
        return not talking and not wants and self.broker is not None and not self._unsynced()

    def _unsynced(self) -> bool:
        assert self.broker is not None
        devices = self.broker.broker._devices.values()
        return not devices or any(s.unsynced for each in devices for s in each._sessions.values())

    # Clients and the driver

    def _submit(self) -> None:
        if self.ending or self.kernel.outstanding > 2 * self.scenario.queues * self.scenario.depth:
            return
        request = self.disk.request()
        if request is None:
            return
        self.counts["requests"] += 1
        queue = self.rng.randrange(self.scenario.queues)
        self.note(f"client: {request} on queue {queue}")
        self.kernel.submit(queue, request)

    def _dispatch(self) -> None:
        queue = self.rng.randrange(self.scenario.queues)
        waiting = self.kernel.queues[queue].waiting
        short = None
        if self.scenario.model == "6.12" and waiting and waiting[0].left and self.rng.random() < 0.1:
            short = self.disk.whole_blocks(self.rng.randint(1, waiting[0].left))
        self.kernel.dispatch(queue, self.rng.choice, short)

    def _copy(self) -> None:
        number = self.rng.randrange(self.scenario.queues)
        queue = self.kernel.queues[number]
        copying = queue.held_by(TagOwner.COPYING)
        if not copying:
            return
        tag, chance, sectors = self.rng.choice(copying), self.rng.random(), None
        if chance < 0.05:
            sectors = 0
        elif chance < 0.1:
            request = queue.tags[tag].request
            assert request is not None
            sectors = self.disk.whole_blocks(self.rng.randint(1, request.left))
            if sectors < request.left:
                # Linux 7.3 takes the commit of a short copy for the whole request.
                self.may_fail.add(request)
        self.kernel.copy(number, tag, sectors)

    def _driver(self) -> None:
        """The driver's own work: the request timer, the quiesce work."""
        for job in list(self.jobs):
            if job.step():
                self.jobs.remove(job)
        number = self.rng.randrange(self.scenario.queues)
        if self.kernel.notice(number):
            self.note(f"driver: the timer notices queue {number}")
        if self.kernel.quiesce():
            self.note("driver: QUIESCED")
        if self.rng.random() < 0.5 and self.kernel.tear():
            self.note("driver: what the siblings of a dead worker have fetched is cancelled")

    def _harvest(self) -> None:
        for request in self.kernel.finished:
            assert request.result is not None
            if request.op not in list(Op):
                assert request.result == -95, f"{request}"
            elif request.result < 0:
                assert request in self.may_fail, f"{request} failed"
            self.witness.answered(request)
            self.disk.end(request)
        self.kernel.finished.clear()

    def _tick(self) -> None:
        self.clock.now_s += self.rng.choice((0.001, 0.02, 0.1, 0.3, 1.0 if self.ending else 0.0))
        if self.scenario.pauses and self.rng.random() < 0.05:
            pause_s = self.rng.choice(PAUSES_S)
            self.note(f"no process runs for {pause_s} s")
            self.counts["pauses"] += 1
            self.clock.now_s += pause_s

    # Deaths

    def _kill(self) -> None:
        if not self.kills or self.rng.random() > 0.3:
            return
        changing = self.daemon is None or self.daemon.device.state != "live"
        if changing and "backend" in self.kills and self.rng.random() < 0.5:
            # A recovery is short: by chance alone few backends would die in one.
            self.kills.remove("backend")
            self.kills.append("backend")
        victim = self.kills[-1]
        if victim != "backend" and (self.daemon is None or self.limit >= LIVES_MAX):
            return
        if self._has_killed(victim):
            self.kills.pop()
            self.counts["kills"] += 1
            self.counts[f"{victim} killed"] += 1
            self.counts[f"{victim} killed in a recovery"] += changing
            self.limit += victim in ("worker", "broker")

    def _has_killed(self, victim: Victim) -> bool:
        effects = self.rng.choice((0, 0, 1, 2, 5))
        if victim == "worker" and self.workers:
            worker = self.rng.choice(self.workers)
            self.note(f"{worker.task} is to die after {effects} effects")
            worker.life.die_after(effects)
            if not effects:
                self._end_worker(worker)
            return True
        if victim == "backend" and self.backend is not None and not self.backend.kill_pending:
            if effects:
                self.backend.life.die_after(effects)
            else:
                self._end_backend()
            return True
        if victim == "broker" and self.broker is not None:
            if effects:
                self.broker.life.die_after(effects)
            else:
                self._end_broker()
            return True
        if victim == "supervisor" and self.daemon is not None:
            if self.rng.random() < 0.5:
                self._dies_in_fork = True
            else:
                self._kill_supervisor()
            return True
        return False

    # What always holds

    def check(self) -> None:
        """No worker is at fault or asleep on arrived work, and each buffer has one owner, the one in its header."""
        if self.backend is not None:
            self.backend.check()
            healthy = self.scenario.pauses and not self.scenario.lies
            assert not (healthy and self.backend.was_cut_off), "a healthy backend is cut off"
        owner_of: dict[int, Task] = {}
        for worker in self.workers:
            task = worker.task
            worker.check()
            for slot in worker.held():
                other = owner_of.setdefault(slot, task)
                assert other is task, f"slot {slot} has two owners: {task} and {other}"
                named = worker.named_owner(slot)
                assert named == (task.queue, task.epoch), f"slot {slot} of {task} has {named} in its header"

    def _check_buffers_at_rest(self) -> None:
        """Every buffer is free at the broker or with the worker that its header names."""
        assert self.broker is not None
        self.check()
        held = {slot for worker in self.workers for slot in worker.held()}
        (device,) = self.broker.broker._devices.values()
        leased = {
            slot
            for slot in range(self.witness.pools[-1].arena.geometry.slot_count)
            if device._table.owner_of(slot) is not None
        }
        assert leased == held, f"buffers are lost: {sorted(leased ^ held)}"

    def _delete(self) -> None:
        daemon = self.daemon
        assert daemon is not None
        self.deleting = True
        deleting = daemon.spawn(lambda: daemon.device.delete(force=True))
        self._until(lambda: bool(deleting.done()), "the device is not deleted")
        deleting.result()
        assert not self.workers and self.backend is None and self.kernel.gone

    def _clean_up(self) -> None:
        for daemon in self.daemons:
            daemon.loop.bury()
        for worker in self.workers:
            worker.loop.die()
        for backend in self.backends:
            if not backend.ended or backend in self.zombies:
                backend.forget()
        if self.broker is not None:
            self.broker.end()
        self._close_memory()
        shutil.rmtree(self.state_dir)
        if self.scenario.rings:
            shutil.rmtree(self._queue_dir)

    def _close_memory(self) -> None:
        for stranger in self.strangers:
            stranger.close()
        for worker in self.all_workers:
            worker.unmap()
        for arena in self.arenas:
            arena.close()
        for pool in self.witness.pools:
            pool.close()
            pool.arena.close()
