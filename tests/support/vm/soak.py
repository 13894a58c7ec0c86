"""Kills random processes of the daemon, counts them, and waits for recovery in between.

The daemon gives up a device after RESTARTS_MAX deaths in a row without a steady life, so after some deaths the test
lets all devices run steadily.
"""

import random
import time
from collections import Counter
from collections.abc import Sequence

from support.vm.daemon import Daemon, marked_processes
from support.vm.recovery import kill, wait_for_backend, wait_for_epoch
from ublkpool.daemon.device.recovery import RESTARTS_MAX, STEADY_S
from ublkpool.daemon.status import DeviceStatus

VICTIMS = {"worker": 8, "backend": 4, "broker": 2, "supervisor": 1, "everything": 1}
"""The victims, with their relative frequency."""
PAUSE_MAX_S = 1.5


class Death:
    """Kills processes of a daemon that serves these devices."""

    def __init__(
        self, daemon: Daemon, names: Sequence[str], rng: random.Random, spared: Sequence[str] = ()
    ) -> None:
        """`spared` victims are never chosen."""
        self._daemon, self._names, self._rng = daemon, names, rng
        self._victims = {what: often for what, often in VICTIMS.items() if what not in spared}
        self._since_rest = 0
        self._epoch_due = dict.fromkeys(names, 1)
        self.took: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self.took.total()

    def strike(self) -> None:
        """Kill a victim, at a moment that the seed chooses."""
        # No condition to await: the random moment is the test.
        time.sleep(self._rng.uniform(0, PAUSE_MAX_S))
        (what,) = self._rng.choices(list(self._victims), list(self._victims.values()))
        self.take(what)

    def take(self, what: str) -> None:
        """Kill a victim of this kind; start the daemon again if it was killed."""
        status = self._daemon.status(self._rng.choice(self._names))
        if what == "supervisor":
            self._take_supervisor(status)
        elif what == "everything":
            self.took[what] += len(marked_processes(str(self._daemon.run_dir)))
            self._daemon.crash_everything()
            self._start()
        else:
            self._take_one(what, status)
        self._since_rest += 1
        if self._since_rest == RESTARTS_MAX - 1:
            self.rest()

    def rest(self) -> None:
        """Wait until every device has recovered, has a backend, and has run steadily for STEADY_S seconds.

        Otherwise on a slow machine no backend would attach between two deaths, and the client would wait for minutes.
        """
        for name in self._names:
            wait_for_epoch(self._daemon, name, self._epoch_due[name])
            wait_for_backend(self._daemon, name, None)
        time.sleep(STEADY_S)
        self._since_rest = 0

    def summary(self) -> str:
        """The number of deaths by kind."""
        return f"{self.total} killed ({', '.join(f'{what} {count}' for what, count in sorted(self.took.items()))})"

    def _take_one(self, what: str, status: DeviceStatus) -> None:
        pids = {
            "worker": [each.pid for each in status.workers],
            "backend": [status.backend.pid or 0],
            "broker": [self._daemon.broker_pid],
        }[what]
        # At this moment none may run.
        if kill(self._rng.choice(pids or [0])):
            self.took[what] += 1
            if what == "worker":
                # A device that is live in the epoch of the death has not noticed it yet.
                self._epoch_due[status.name] = status.epoch + 1

    def _take_supervisor(self, status: DeviceStatus) -> None:
        self._daemon.crash()
        self.took["supervisor"] += 1
        if self._rng.random() < 0.5:
            self._take_one(self._rng.choice(["worker", "backend"]), status)
        self._start()

    def _start(self) -> None:
        self._daemon.start()
        # Deaths during a takeover are the subject of another test.
        self.rest()
