"""Control commands of a simulation: `ublk.control` on a made-up kernel, each in a disposable process.

Such a process dies with the supervisor that started it.
"""

import asyncio
import errno
import random
from collections.abc import Callable
from typing import Any

from support.fakes.queue_rig import DEVICE
from support.sim.defects import END_COMES_LATE
from support.sim.kernel import SimKernel
from ublkpool.daemon.kernel.control_process import DEADLINE_S, ControlFailed, ControlRunner
from ublkpool.ublk.abi import DeviceInfo, DeviceState, Feature, Parameters
from ublkpool.ublk.errors import UblkError


class ControlJob:
    """A disposable process with one control command."""

    def __init__(self, command: Callable[[], Any], turns: int, begun: asyncio.Event | None = None) -> None:
        self._command = command
        self._begun = begun
        self._turns = turns
        self.blocked: Blocked | None = None
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def step(self) -> bool:
        """One step of the process; whether it has ended."""
        if self._turns > 0:
            self._turns -= 1
            return False
        try:
            value = self.blocked() if self.blocked else self._command()
        except UblkError as error:
            return self._end(error=ControlFailed(str(error), error.errno))
        finally:
            if self._begun is not None:
                self._begun.set()
        if isinstance(value, Blocked):
            self.blocked = value
            return False
        return self._end(value)

    def _end(self, value: Any = None, error: ControlFailed | None = None) -> bool:
        if not self.answer.done() and not self.answer.get_loop().is_closed():
            if error is None:
                self.answer.set_result(value)
            else:
                self.answer.set_exception(error)
        return True

    def kill(self) -> None:
        """Kill the process: its command has no further effect."""
        if self.blocked is not None:
            self.blocked.give_up()


class Blocked:
    """A control command that waits in the kernel; called again, it says whether it still does."""

    def __init__(self, again: Callable[[], Any], give_up: Callable[[], None] = lambda: None) -> None:
        self._again, self.give_up = again, give_up

    def __call__(self) -> Any:
        return self._again()


class SimControl:
    """`ublk.control` on a made-up kernel."""

    def __init__(self, kernel: SimKernel) -> None:
        self._kernel = kernel

    def get_features(self) -> int:
        return 0 if self._kernel.model == "6.12" else int(Feature.QUIESCE | Feature.UPDATE_SIZE)

    def disk_bytes(self, _device: int) -> int:
        return self._kernel.size_bytes

    def update_size(self, _device: int, size_bytes: int) -> None:
        self._kernel.update_size(size_bytes)

    def device_info(self, _device: int) -> DeviceInfo:
        if self._kernel.gone and self._kernel.state is DeviceState.DEAD:
            raise UblkError("GET_DEV_INFO", errno.ENODEV)
        return info_of(self._kernel)

    def expect_mark(self, device: int, _mark: int) -> None:
        self.device_info(device)

    def queue_cpus(self, _device: int, _queue: int) -> list[int]:
        return [0]

    def set_parameters(self, _device: int, disk: Parameters) -> None:
        assert self._kernel.state is DeviceState.DEAD, "SET_PARAMS after START_DEV"
        self._kernel.size_bytes = disk.size_bytes

    def start_device(self, _device: int, _pid: int) -> Any:
        if self._kernel.all_fetched:
            return self._kernel.start()
        return Blocked(lambda: self.start_device(0, 0))

    def complete_fetch_round(self, _device: int, _queues: int, _depth: int) -> None:
        self._kernel.complete_fetch_round()

    def start_recovery(self, _device: int) -> None:
        self._kernel.start_recovery()

    def end_recovery(self, _device: int, _pid: int) -> Any:
        ending = self._kernel.wait_to_end_recovery()

        def again() -> Any:
            if ending.is_over:
                return ending.result()
            return blocked

        blocked = Blocked(again, ending.give_up)
        return again()

    def stop_device(self, _device: int) -> Any:
        return None if self._kernel.stop() else Blocked(lambda: self.stop_device(0))

    def delete_device_later(self, _device: int) -> None:
        self._kernel.state = DeviceState.DEAD


def info_of(kernel: SimKernel) -> DeviceInfo:
    """The answer to GET_DEV_INFO."""
    return DeviceInfo(
        queues=len(kernel.queues),
        depth=kernel.depth,
        state=kernel.state,
        max_io_bytes=kernel.max_io_bytes,
        device_number=DEVICE,
        flags=Feature(0),
    )


class SimRunner(ControlRunner):
    """Disposable processes for control commands: each takes a random number of steps."""

    def __init__(self, rng: random.Random, jobs: list[ControlJob], defect: str) -> None:
        super().__init__()
        self._rng, self._jobs, self._defect = rng, jobs, defect

    async def run_beside(
        self,
        what: str,
        command: Callable[[], Any],
        result: type[Any],
        deadline_s: float = DEADLINE_S,
        begun: asyncio.Event | None = None,
        owner: str = "",
    ) -> Any:
        if begun is not None and self._defect == END_COMES_LATE:
            begun.set()
        job = ControlJob(command, self._rng.randrange(4), begun)
        self._jobs.append(job)
        try:
            return await asyncio.wait_for(asyncio.shield(job.answer), deadline_s)
        except TimeoutError:
            raise ControlFailed(f"{what} has hung", 0) from None
        finally:
            if job in self._jobs:
                self._end(job)
            if job.answer.done():
                # A caller that gave up just before does not hear the answer.
                job.answer.exception()

    def _end(self, job: ControlJob) -> None:
        job.kill()
        self._jobs.remove(job)
