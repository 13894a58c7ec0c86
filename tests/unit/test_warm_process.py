"""Processes that make one call after another."""

import asyncio
import errno
import os
import pickle
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

from support.fakes.descriptors import no_descriptor_left, open_descriptors
from ublkpool.daemon.kernel import control_process
from ublkpool.daemon.kernel.block_device import BlockDevice
from ublkpool.daemon.kernel.control_process import CallHung, ControlFailed, ControlRunner
from ublkpool.daemon.kernel.device_commands import Created
from ublkpool.daemon.kernel.warm_process import IDLE_MAX, PACKET_BYTES_MAX
from ublkpool.daemon.plain_call import Call
from ublkpool.daemon.processes.reserve import Reserve
from ublkpool.daemon.settings.config import BackendConfig, DeviceConfig
from ublkpool.ublk import control, process_calls
from ublkpool.ublk.abi import DeviceInfo, Feature, Parameters
from ublkpool.ublk.errors import UblkError

DEADLINE_S = 60.0
T = TypeVar("T")


def _descriptors(*_: object) -> list[str]:
    return [path for _, path in open_descriptors()]


def _refuse() -> None:
    raise UblkError("STOP_DEV of device 3", 16)


def _leave_open(path: str) -> None:
    os.open(path, os.O_RDONLY)
    os.chdir("/tmp")


def _title() -> str:
    return Path("/proc/self/comm").read_text().strip()


def _crash() -> None:
    raise RuntimeError("an error of its own")


def _look(runner: ControlRunner, call: Call, result: type[T], owner: str = "vol0") -> Any:
    return runner.look(owner, "a look", call, result, DEADLINE_S)


def _run(test: Callable[[ControlRunner], Any]) -> None:
    async def main() -> None:
        runner = ControlRunner()
        try:
            await asyncio.wait_for(test(runner), 2 * DEADLINE_S)
        finally:
            runner.close()

    asyncio.run(main())


def test_calls_one_after_another_are_made_by_one_process_under_the_title_of_each() -> None:
    async def test(runner: ControlRunner) -> None:
        first = await _look(runner, Call(os.getpid), int)
        assert first != os.getpid()
        assert await runner.run("getpid", Call(os.getpid), int) == first
        assert await _look(runner, Call(_title), str) == "ublkpool-look"
        assert await runner.run("title", Call(_title), str) == "ublkpool-ctl"

    _run(test)


def test_calls_at_the_same_time_have_a_process_each_and_a_few_are_kept() -> None:
    async def test(runner: ControlRunner) -> None:
        calls = [runner.run_beside("sleep", Call(_sleep), int) for _ in range(IDLE_MAX + 2)]
        pids = set(await asyncio.gather(*calls))
        assert len(pids) == IDLE_MAX + 2
        kept = {await _look(runner, Call(os.getpid), int) for _ in range(2 * IDLE_MAX)}
        assert len(kept) == 1 and kept < pids
        while len(_alive(pids)) > IDLE_MAX:
            await asyncio.sleep(0.01)

    _run(test)


def _sleep() -> int:
    time.sleep(0.2)
    return os.getpid()


def _alive(pids: set[int]) -> set[int]:
    return {pid for pid in pids if Path(f"/proc/{pid}").exists()}


def test_an_error_of_a_call_is_the_callers_and_the_process_goes_on() -> None:
    async def test(runner: ControlRunner) -> None:
        pid = await _look(runner, Call(os.getpid), int)
        with pytest.raises(ControlFailed, match="STOP_DEV of device 3") as caught:
            await runner.run("STOP_DEV", Call(_refuse), type(None))
        assert caught.value.errno == 16
        with pytest.raises(ControlFailed, match="No such file"):
            await _look(runner, Call(os.listdir, "/nonexistent"), list[str])
        assert await _look(runner, Call(os.getpid), int) == pid

    _run(test)


def test_a_call_that_hangs_is_killed_and_counted_and_others_get_another_process() -> None:
    async def test(runner: ControlRunner) -> None:
        pid = await _look(runner, Call(os.getpid), int)
        with pytest.raises(CallHung, match=f"opening has hung for 0 s in process {pid}"):
            await runner.look("stuck", "opening", Call(signal.pause), type(None), 0.1)
        other = await _look(runner, Call(os.getpid), int)
        assert other != pid
        while Path(f"/proc/{pid}").exists():
            await asyncio.sleep(0.01)

    _run(test)


def test_finished_calls_do_not_count_as_unfinished() -> None:
    async def test(runner: ControlRunner) -> None:
        assert await _look(runner, Call(os.getpid), int)
        # Its process lives on, perhaps with a call of another owner.
        assert not runner._unfinished("vol0")

    _run(test)


def test_a_cancelled_call_has_ended_when_the_caller_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_process, "KILL_PATIENCE_S", DEADLINE_S)

    async def test(runner: ControlRunner) -> None:
        pid, begun = await _look(runner, Call(os.getpid), int), asyncio.Event()
        waiting = asyncio.ensure_future(
            runner.run_beside("sleep", Call(signal.pause), type(None), 600.0, begun)
        )
        await begun.wait()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert not Path(f"/proc/{pid}").exists()

    _run(test)


def test_a_call_leaves_no_descriptor_and_no_directory_in_the_process(tmp_path: Path) -> None:
    """A lock, a device or a file system would be kept by it."""
    file = tmp_path / "store"
    file.touch()

    async def test(runner: ControlRunner) -> None:
        before = await _look(runner, Call(_descriptors), list[str])
        await _look(runner, Call(_leave_open, str(file)), type(None))
        after = await _look(runner, Call(_descriptors), list[str])
        assert len(after) == len(before) and str(file) not in after
        assert await _look(runner, Call(os.getcwd), str) == str(Path.cwd())

    _run(test)


def test_what_a_call_has_left_open_is_closed_before_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    close_all_but = process_calls.close_all_but

    def slowly(keep: Sequence[int]) -> None:
        time.sleep(0.1)
        close_all_but(keep)

    monkeypatch.setattr(process_calls, "close_all_but", slowly)

    async def test(runner: ControlRunner) -> None:
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        assert await _look(runner, Call(_descriptors, fds=[writer]), list[str])
        os.close(writer)
        assert os.read(reader, 1) == b"", "no process has the other end"
        os.close(reader)

    _run(test)


def test_a_call_has_the_descriptors_that_it_was_given() -> None:
    async def test(runner: ControlRunner) -> None:
        reader, writer = os.pipe()
        assert await _look(runner, Call(os.write, b"written", fds=[writer]), int) == 7
        assert os.read(reader, 100) == b"written"
        os.close(reader)
        os.close(writer)

    _run(test)


def test_a_process_that_died_meanwhile_is_replaced() -> None:
    async def test(runner: ControlRunner) -> None:
        pid = await _look(runner, Call(os.getpid), int)
        os.kill(pid, signal.SIGKILL)
        # The loop does not run meanwhile, and so does not know.
        while Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
            time.sleep(0.01)
        other = await _look(runner, Call(os.getpid), int)
        assert other != pid
        with pytest.raises(ControlFailed, match=r"^a look: its process died without an answer$"):
            await _look(runner, Call(_crash), type(None))
        assert await _look(runner, Call(os.getpid), int) not in (pid, other)

    _run(test)


def test_a_call_that_fits_no_packet_or_refers_to_this_process_alone_is_made_by_a_forked_one() -> None:
    async def test(runner: ControlRunner) -> None:
        pid = await _look(runner, Call(os.getpid), int)
        assert await _look(runner, Call(len, b"x" * PACKET_BYTES_MAX), int) == PACKET_BYTES_MAX
        forked = await _look(runner, Call(lambda: os.getpid()), int)
        assert forked != pid
        assert await _look(runner, Call(os.getpid), int) == pid

    _run(test)


def test_the_processes_end_when_the_runner_is_closed_or_forgotten() -> None:
    async def test(runner: ControlRunner) -> None:
        forgotten = ControlRunner()
        pids = {await _look(each, Call(os.getpid), int) for each in (runner, forgotten)}
        assert len(pids) == 2
        runner.close()
        del forgotten
        while _alive(pids):
            await asyncio.sleep(0.01)

    _run(test)


def test_a_call_is_made_when_no_descriptor_is_left_but_the_reserve() -> None:
    async def main() -> None:
        before, reserve = open_descriptors(), Reserve()
        runner = ControlRunner(reserve)
        with no_descriptor_left():
            for _ in range(3):
                assert await runner.run("answer", Call(len, "four"), int) == 4
        pid = await runner.run("pid", Call(os.getpid), int)
        runner.close()
        reserve.close()
        while Path(f"/proc/{pid}").exists():
            await asyncio.sleep(0.01)
        assert open_descriptors() == before

    asyncio.run(main())


class _Noting(ControlRunner):
    """Notes the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    async def run_beside(self, what: str, command: Any, result: type[Any], *_: Any, **__: Any) -> Any:
        self.calls.append(command)
        if result is int:
            return -1
        return Created(DeviceInfo(queues=1, depth=1, max_io_bytes=4096, device_number=3), [[0]], Feature(0))

    async def look(self, owner: str, what: str, work: Any, result: type[Any], *_: Any, **__: Any) -> Any:
        self.calls.append(work)
        return True


def test_no_step_of_a_device_costs_a_fork() -> None:
    async def main() -> None:
        runner = _Noting()
        config = DeviceConfig(name="vol0", backend=BackendConfig(kind="null"))
        disk = Parameters(size_bytes=1 << 20, max_io_bytes=1 << 19)
        kernel = await BlockDevice.create(runner, config, disk, 7)
        new = Feature.QUIESCE | Feature.SAFE_STOP_DEV | Feature.UPDATE_SIZE
        kernel = BlockDevice(runner, "vol0", Created(kernel.info, [[0]], new))
        await kernel.start(1.0, Call(_check, "check", fds=[0]))
        await kernel.end_recovery(1.0, asyncio.Event())
        await kernel.wait_for_node()
        await kernel.set_io_timeout(1000)
        await kernel.update_size(1 << 21, 1.0)
        await kernel.users()
        await kernel.is_claimed()
        await kernel.mappers()
        await kernel.has_gone()
        await kernel.start_recovery(1.0)
        await kernel.try_stop(1.0)
        await kernel.stop(1.0)
        await kernel.delete()
        await BlockDevice.find_marked(runner, "vol0", 7)
        assert len(runner.calls) >= 12
        for each in runner.calls:
            assert isinstance(each, Call)
            pickle.dumps((each.function, each.arguments))

    asyncio.run(main())


def test_what_must_end_with_its_process_is_made_by_a_forked_one() -> None:
    async def main() -> None:
        runner = _Noting()
        info = DeviceInfo(queues=1, depth=1, max_io_bytes=4096, device_number=3)
        kernel = BlockDevice(runner, "vol0", Created(info, [[0]], Feature(0)))
        await kernel.start_recovery(1.0)
        assert [isinstance(each, Call) for each in runner.calls] == [False, True]

    asyncio.run(main())


def test_the_check_before_requests_come_is_made_by_the_process_of_the_command_right_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("start_device", "end_recovery"):
        monkeypatch.setattr(control, name, _command)
    monkeypatch.setattr(control, "expect_mark", _mark)

    async def test(runner: ControlRunner) -> None:
        kernel = BlockDevice(
            runner, "vol0", Created(DeviceInfo(1, 1, 4096, device_number=3), [[0]], Feature(0))
        )
        reader, writer = os.pipe()
        check = Call(_check, "check", fds=[writer])
        with pytest.raises(ControlFailed, match="the command came"):
            await kernel.start(DEADLINE_S, check)
        with pytest.raises(ControlFailed, match="the command came"):
            await kernel.end_recovery(DEADLINE_S, asyncio.Event(), check)
        pids, steps = set(), []
        for line in os.read(reader, 4096).decode().split("\n")[:-1]:
            pid, step = line.split()
            pids.add(pid)
            steps.append(step)
        assert steps == ["check"] * 2 and len(pids) == 1
        with pytest.raises(ControlFailed, match="queue 0: its worker") as caught:
            await kernel.start(DEADLINE_S, Call(_refuse_to_start, fds=[writer]))
        assert caught.value.errno == errno.EOWNERDEAD
        os.close(reader)
        os.close(writer)

    _run(test)


def _mark(number: int, mark: int) -> None:
    """It is the daemon's."""
    assert (number, mark) == (3, 0)


def _check(fd: int, step: str) -> None:
    os.write(fd, f"{os.getpid()} {step}\n".encode())


def _refuse_to_start(_fd: int) -> None:
    raise UblkError("queue 0: its worker or its tags have gone", errno.EOWNERDEAD)


def _command(number: int, pid: int) -> None:
    assert (number, pid) == (3, os.getppid())
    raise UblkError("the command came", errno.EPERM)
