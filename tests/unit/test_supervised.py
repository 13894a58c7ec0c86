"""A supervised process: started again after every end, until it is told to end."""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable

import pytest

from ublkpool.daemon.processes.children import Child
from ublkpool.daemon.processes.supervised import SupervisedProcess
from ublkpool.workers.process import fork_child

DEADLINE_S = 60
_log = logging.getLogger("ublkpool.test")


class Sleeper(SupervisedProcess):
    """A process that sleeps; the next `failures` starts fail."""

    def __init__(self) -> None:
        super().__init__("the sleeper", _log, 0.001, 0.001)
        self.failures = 0
        self.ends: list[int | None] = []
        self.restarts = 0

    def _start(self) -> None:
        if self.failures:
            self.failures -= 1
            raise BlockingIOError(11, "Resource temporarily unavailable")
        self.child = Child(fork_child(_sleep, [], "ublkpool-test"))

    async def _clear_away(self, pause_s: float) -> None:
        self.ends.append(self.child.exit_status)

    def _on_restart(self) -> None:
        self.restarts += 1


def _sleep() -> int:
    reader, _writer = os.pipe()
    os.read(reader, 1)
    return 0


def in_loop(test: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await asyncio.wait_for(test(), DEADLINE_S)

    asyncio.run(run())


def test_a_process_is_started_again_after_every_end_although_starts_fail() -> None:
    async def run() -> None:
        sleeper = Sleeper()
        assert not sleeper.is_started
        sleeper.start()
        supervision = asyncio.ensure_future(sleeper.keep_running())
        for count in (1, 2):
            sleeper.failures = 3
            await sleeper.child.kill()
            while sleeper.restarts < count:
                await asyncio.sleep(0)
            assert sleeper.child.exit_status is None and not sleeper.failures
        assert sleeper.ends == [137, 137]
        sleeper.let_end()
        await sleeper.child.kill()
        await supervision
        assert sleeper.restarts == 2

    in_loop(run)


@pytest.mark.parametrize("failures", [0, 5])
def test_a_process_that_is_told_to_end_between_an_end_and_a_start_stays_away(failures: int) -> None:
    async def run() -> None:
        sleeper = Sleeper()
        sleeper.start()
        first = sleeper.child
        supervision = asyncio.ensure_future(sleeper.keep_running())
        await first.kill()
        while not sleeper.ends:
            await asyncio.sleep(0)
        sleeper.failures = failures
        sleeper.let_end()
        await supervision
        assert sleeper.child is first and not sleeper.restarts

    in_loop(run)


def test_a_start_that_fails_at_first_leaves_no_process() -> None:
    async def run() -> None:
        sleeper = Sleeper()
        sleeper.failures = 1
        with pytest.raises(OSError, match="temporarily"):
            sleeper.start()
        assert not sleeper.is_started
        await sleeper.start_surely()
        assert sleeper.is_started
        await sleeper.child.kill()

    in_loop(run)
