"""An asyncio loop that a simulation turns by hand, on a clock that only the run moves.

Owns nothing but time: no descriptor is ever polled, and `kill` ends everything that ran on the loop as `kill -9` would.
"""

import asyncio
from typing import Any

from ublkpool.daemon.processes.patient_loop import ServingClock

TURN_S = 10.0
"""A process without a turn for longer than this was stopped; nothing else in a simulation takes so long."""


class Clock:
    """Seconds since the run began; the only time there is."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class _NothingToWatch:
    def select(self, _timeout_s: float | None) -> list[Any]:
        return []

    def close(self) -> None:
        """Nothing is open."""


class SimLoop(asyncio.BaseEventLoop):
    """One process's loop; `turn` runs what is ready and due, once."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._serving = ServingClock(clock)
        self._selector = _NothingToWatch()
        self.dead = False
        self.failures: list[str] = []
        self.set_exception_handler(self._note)

    def time(self) -> float:
        return self._serving.read(TURN_S)

    def _process_events(self, _events: list[Any]) -> None:
        """There are none."""

    def turn(self) -> None:
        """One iteration: callbacks that are ready, timers that are due."""
        if not self.dead:
            self.call_soon(self.stop)
            self.run_forever()

    def kill(self) -> None:
        """Never turn again."""
        self.dead = True

    def bury(self) -> None:
        """End the tasks of a loop that will never turn again, so that asyncio does not complain of them."""
        self.dead = True
        for _ in range(64):
            tasks = asyncio.all_tasks(self)
            if not tasks:
                break
            for task in tasks:
                task.cancel()
            self.call_soon(self.stop)
            self.run_forever()
        self.close()

    def _note(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if not self.dead:
            self.failures.append(f"{context.get('message')}: {context.get('exception')!r}")
