"""A state directory in memory, and a runner that runs commands in this process instead of a child."""

import asyncio
from collections.abc import Callable
from typing import Any

from ublkpool.daemon.device.state import DeviceState
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.kernel.control_process import ControlFailed


class DirectRunner:
    """Runs each command in this process."""

    async def run_beside(
        self,
        what: str,
        command: Callable[[], Any],
        result: type[None],
        deadline_s: float = 0.0,
        *,
        owner: str = "",
    ) -> None:
        try:
            command()
        except OSError as error:
            raise ControlFailed(str(error), error.errno or 0) from error


class FakeStates:
    """A `StateDirectory` for a device; with `broken` set every write fails."""

    def __init__(self) -> None:
        self.states: dict[str, DeviceState] = {}
        self._turns: dict[str, asyncio.Lock] = {}
        self.broken = ""

    def turn(self, name: str) -> asyncio.Lock:
        return self._turns.setdefault(name, asyncio.Lock())

    def get(self, name: str) -> DeviceState:
        return self.states.get(name) or DeviceState(name=name)

    def generation(self, name: str) -> int:
        return self.get(name).generation

    def knows(self, name: str) -> bool:
        return self.get(name).store is not None

    async def save(self, state: DeviceState) -> None:
        if self.broken:
            raise DaemonError(self.broken)
        self.states[state.name] = state
