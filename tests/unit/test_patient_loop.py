"""The supervisor's clock: no deadline expires because the process was paused."""

import asyncio
import os
from collections.abc import Coroutine
from typing import Any

import pytest

from ublkpool.daemon.processes.patient_loop import PAUSE_S, QUIET_S, PatientLoop, ServingClock


class System:
    """The machine's clock, which the test sets."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_observed_time_counts() -> None:
    system = System()
    clock = ServingClock(system)
    begun_s = clock.read()
    for _ in range(100):
        system.now_s += 0.5
        clock.read()
    assert clock.read() - begun_s == pytest.approx(50)


def test_a_long_intended_wait_is_no_pause() -> None:
    system = System()
    clock = ServingClock(system)
    begun_s = clock.read()
    system.now_s += 60
    assert clock.read(waited_s=60) - begun_s == pytest.approx(60)


@pytest.mark.parametrize("pause_s", [PAUSE_S + 0.1, 15, 86400])
@pytest.mark.parametrize("waited_s", [0, 1])
def test_a_pause_does_not_count_and_other_processes_get_time_to_run_again(
    pause_s: float, waited_s: float
) -> None:
    system = System()
    clock = ServingClock(system)
    begun_s = clock.read()
    system.now_s += pause_s + waited_s
    assert clock.read(waited_s) == begun_s
    system.now_s += QUIET_S / 2
    assert clock.read() == begun_s
    system.now_s += QUIET_S
    assert clock.read() - begun_s == pytest.approx(QUIET_S / 2)


def test_time_never_goes_back_over_several_pauses() -> None:
    system = System()
    clock = ServingClock(system)
    last_s = clock.read()
    for step in (0.1, 3, 0.5, 4, 0.9, 0.2, 0.2, 100, 2, 0.3, 2.5, 2.5):
        system.now_s += step
        now_s = clock.read()
        assert last_s <= now_s <= last_s + step
        last_s = now_s


def run(system: System, main: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=lambda: PatientLoop(system)) as runner:
        runner.run(main)


def test_an_answer_that_came_during_a_pause_is_received_before_its_deadline_is_checked() -> None:
    """The process is stopped for an hour during a wait of 30 s, and the answer is in the socket."""
    system = System()
    reader, writer = os.pipe()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[bytes] = loop.create_future()
        loop.add_reader(reader, lambda: answered.set_result(os.read(reader, 1)))

        def stopped_and_continued() -> None:
            system.now_s += 3600
            os.write(writer, b"!")

        loop.call_soon(stopped_and_continued)
        async with asyncio.timeout(30):
            assert await answered == b"!"
        loop.remove_reader(reader)

    run(system, main())
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("before_s", [0.0, 29.9])
def test_a_process_that_was_paused_too_has_time_to_answer(before_s: float) -> None:
    system = System()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        answered = loop.create_future()
        waiting = asyncio.ensure_future(asyncio.wait_for(answered, 30))
        await asyncio.sleep(0)
        for _ in range(int(before_s * 10)):
            system.now_s += 0.1
            await asyncio.sleep(0)
        system.now_s += 3600
        for _ in range(8):
            system.now_s += QUIET_S / 10
            await asyncio.sleep(0)
        assert not waiting.done()
        answered.set_result(None)
        await waiting

    run(system, main())


def test_a_process_that_stays_silent_still_exceeds_its_deadline() -> None:
    system = System()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        waiting = asyncio.ensure_future(asyncio.wait_for(loop.create_future(), 30))
        system.now_s += 3600
        for _ in range(400):
            system.now_s += 0.1
            await asyncio.sleep(0)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(waiting, None)

    run(system, main())
