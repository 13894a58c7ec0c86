"""A death at each step of a recovery: one worker of the new epoch, all of them, or the daemon."""

import os
import time
from collections.abc import Iterator

import pytest

from support.guest.one_kernel import runs_here
from support.vm.daemon import Daemon, eventually
from support.vm.killing_daemon import PLAN, STEPS, arm
from support.vm.recovery import kill, loaded, wait_for_epoch
from ublkpool.daemon.device.recovery import STEADY_S

QUEUES = 3
"""A death's effect on the tags of a second queue shows when a third queue makes the device live."""
EVERY = [(step, victim) for step in STEPS[1:] for victim in ("worker", "workers")]
EVERY += [(step, "daemon") for step in STEPS]
SHORT = {
    "6.12": [
        ("forked", "worker"),
        ("first ready", "worker"),
        ("started", "daemon"),
        ("first ready", "daemon"),
    ],
    "7.3": [("fenced", "workers"), ("all ready", "workers"), ("forked", "daemon")],
}
"""What each kernel's guest runs where both run; each takes up to half a minute."""


def _hurts() -> list[tuple[str, str]]:
    """What this guest runs: its part of SHORT, all of SHORT if no other guest has the rest, EVERY if asked for."""
    if "UBLKPOOL_EVERY_STEP" in os.environ:
        return EVERY
    return [hurt for kernel, hurts in SHORT.items() if runs_here(kernel) for hurt in hurts]


@pytest.fixture
def hurt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    daemon = Daemon(name="hurt", module="support.vm.killing_daemon")
    monkeypatch.setenv(PLAN, str(daemon.path("plan")))
    with daemon.life():
        yield daemon


def test_a_recovery_survives_a_death_at_any_step(hurt: Daemon) -> None:
    status = hurt.add("vol", "memory", {"size": "64M"}, queues=QUEUES)
    with loaded(hurt, [status]) as (load,):
        for step, victim in _hurts():
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
