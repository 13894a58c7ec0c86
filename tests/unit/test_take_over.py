"""`ublkpool add --take-over`: the word is for one add, whatever becomes of it."""

import asyncio
from typing import Any

import pytest

from support.fakes.device_parts import fake_context
from ublkpool.daemon.device.binding import Binding
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.processes.background import Background
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.daemon.supervisor import Supervisor


class Table:
    """Adds nothing: notes what a backend would hear, then ends as the test says."""

    def __init__(self, binding: Binding, error: BaseException | None) -> None:
        self.binding, self.error = binding, error
        self.heard: list[bool] = []

    async def add(self, cfg: DeviceConfig, progress: object) -> Any:
        self.heard.append(self.binding.takes_over())
        if self.error is not None:
            raise self.error
        return self

    def status(self) -> str:
        return "live"


def add(error: BaseException | None, take_over: bool) -> tuple[list[bool], bool]:
    """What the backend hears, and what the next one would."""

    async def run() -> tuple[list[bool], bool]:
        context = fake_context()
        supervisor = Supervisor(context, Background("the daemon"))
        binding = Binding("vol0", context.states, context.boot_id)
        table = Table(binding, error)
        vars(supervisor).update(_table=table)
        adding = supervisor.add(DeviceConfig(name="vol0"), lambda line: None, take_over)
        if error is None:
            await adding
        else:
            with pytest.raises(type(error)):
                await adding
        return table.heard, binding.takes_over()

    return asyncio.run(run())


def test_a_backend_hears_it_only_on_command() -> None:
    assert add(None, False) == ([False], False)
    # A bind ends it, which the device's own backend does.
    assert add(None, True) == ([True], True)


@pytest.mark.parametrize("error", [DaemonError("no"), asyncio.CancelledError()])
def test_an_add_that_fails_or_is_given_up_takes_the_word_back(error: BaseException) -> None:
    assert add(error, True) == ([True], False)
