"""A death at each step of a recovery: one worker of the new epoch, all of them, or the daemon."""

import os
import time
from collections.abc import Iterator

import pytest

from support.vm.daemon import Daemon, eventually
from support.vm.killing_daemon import PLAN, STEPS, arm
from support.vm.recovery import kill, loaded, wait_for_epoch
from ublkpool.daemon.device.recovery import STEADY_S

QUEUES = 3
"""A death's effect on the tags of a second queue shows when a third queue makes the device live."""
EVERY = [(step, victim) for step in STEPS[1:] for victim in ("worker", "workers")]
EVERY += [(step, "daemon") for step in STEPS]
SHORT = [
    *(("forked", "worker"), ("fenced", "workers"), ("first ready", "worker"), ("all ready", "workers")),
    *(("started", "daemon"), ("forked", "daemon"), ("first ready", "daemon")),
]
HURTS = EVERY if "UBLKPOOL_EVERY_STEP" in os.environ else SHORT
"""Each takes some seconds in a guest; UBLKPOOL_EVERY_STEP=1 runs all of EVERY."""


@pytest.fixture
def hurt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    daemon = Daemon(name="hurt", module="support.vm.killing_daemon")
    monkeypatch.setenv(PLAN, str(daemon.path("plan")))
    with daemon.life():
        yield daemon


def test_a_recovery_survives_a_death_at_any_step(hurt: Daemon) -> None:
    status = hurt.add("vol", "memory", {"size": "64M"}, queues=QUEUES)
    with loaded(hurt, [status]) as (load,):
        for step, victim in HURTS:
            before = hurt.status("vol")
            print(f"{victim} at {step!r}", flush=True)
            arm(hurt.path("plan"), step, victim)
            kill(before.workers[-1].pid)
            eventually(lambda: not hurt.path("plan").exists(), f"{victim} killed at {step!r}")
            if victim == "daemon":
                hurt.wait_end()
                hurt.start()
            # A daemon that dies before the fork has not raised the epoch yet.
            begun = before.epoch + (0 if step == "started" else 1)
            after = wait_for_epoch(hurt, "vol", begun + 1)
            assert after.path == status.path
            load.goes_on()
            # Deaths in quicker succession count against the restart limit.
            time.sleep(STEADY_S)
