"""The service manager's watchdog: told only while the loop turns, and only if it asked this very process."""

import asyncio
import os
import time
from pathlib import Path

import pytest

from support.fakes.descriptors import open_descriptors
from support.served import Client, serving
from ublkpool.daemon.processes.patient_loop import PatientLoop
from ublkpool.daemon.settings.config import ServeConfig
from ublkpool.daemon.watchdog import PETS_PER_PERIOD, period_us, petting
from unit.test_supervisor import Systemd, systemd

__all__ = ["systemd"]
UNIT = Path(__file__).parents[2] / "config" / "ublkpool.service"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 0),
        ({"WATCHDOG_USEC": "3000000"}, 3_000_000),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "7"}, 3_000_000),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "8"}, 0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": ""}, 0),
        ({"WATCHDOG_USEC": ""}, 0),
        ({"WATCHDOG_USEC": "-1"}, 0),
        ({"WATCHDOG_USEC": "soon"}, 0),
        ({"WATCHDOG_USEC": "0", "WATCHDOG_PID": "7"}, 0),
    ],
)
def test_the_watchdog_is_that_of_this_process_or_none(environment: dict[str, str], expected: int) -> None:
    assert period_us(environment, 7) == expected


def test_without_a_watchdog_no_timer_runs() -> None:
    async def run() -> None:
        before = open_descriptors()
        pets: list[float] = []
        with petting(0, lambda: pets.append(0.0)):
            assert open_descriptors() == before
        assert pets == []

    asyncio.run(run())


def test_it_is_told_again_and_again_until_the_end() -> None:
    async def run() -> None:
        told = asyncio.Event()
        begun_s = time.monotonic()
        pets: list[float] = []

        def pet() -> None:
            pets.append(time.monotonic())
            if len(pets) == 4:
                told.set()

        with petting(40_000, pet):
            assert len(pets) == 1, "at once: systemd counts from the start"
            await told.wait()
        assert pets[3] - begun_s >= 3 * 0.04 / PETS_PER_PERIOD
        count = len(pets)
        await asyncio.sleep(0.03)
        assert len(pets) == count

    asyncio.run(run())


def test_it_is_not_told_while_the_loop_hangs_and_once_after_it() -> None:
    async def run() -> None:
        pets: list[float] = []
        with petting(4_000, lambda: pets.append(time.monotonic())):
            time.sleep(0.1)
            assert len(pets) == 1, "a hanging loop tells nothing"
            while len(pets) == 1:
                await asyncio.sleep(0)

    asyncio.run(run())


def test_a_clock_of_the_loop_that_stands_still_does_not_stop_it() -> None:
    """A starved daemon's turns are all late; it is slow, and it does not hang."""

    async def run() -> None:
        pets: list[float] = []
        with petting(4_000, lambda: pets.append(time.monotonic())):
            while len(pets) < 3:
                await asyncio.sleep(0)

    with asyncio.Runner(loop_factory=lambda: PatientLoop(lambda: 1000.0)) as runner:
        runner.run(run())


def test_the_daemon_tells_the_watchdog_once_it_is_ready(
    tmp_path: Path, systemd: Systemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "40000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))

    async def test(_client: Client) -> None:
        said: list[str] = []
        while said.count("WATCHDOG=1") < 3:
            said += systemd.told()
            await asyncio.sleep(0.001)
        assert said.index("WATCHDOG=1") > next(n for n, each in enumerate(said) if each.startswith("READY=1"))

    serving(ServeConfig(run_dir=tmp_path / "run", state_dir=tmp_path / "state"), test)


def test_the_unit_has_a_watchdog_and_a_reload_and_is_restarted_after_either_failure() -> None:
    lines = [line for line in UNIT.read_text().splitlines() if "=" in line and not line.startswith("#")]
    found = dict(line.split("=", 1) for line in lines)
    assert int(found["WatchdogSec"]) >= 60 and found["Restart"] == "on-failure"
    assert found["KillMode"] == "process", "what serves I/O lives on"
    # notify-reload is unknown to systemd 252, which would take the unit for Type=simple.
    assert (found["Type"], found["ExecReload"]) == ("notify", "ublkpool reload")
