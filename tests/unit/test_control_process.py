"""Disposable processes for control commands and looks."""

import asyncio
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from support.fakes.descriptors import no_descriptor_left, open_descriptors
from ublkpool.daemon.kernel import control_process
from ublkpool.daemon.kernel.control_process import LOOKS_MAX, CallHung, ControlFailed, ControlRunner
from ublkpool.daemon.processes.children import Child
from ublkpool.daemon.processes.reserve import Reserve
from ublkpool.workers.process import fork_child

DEADLINE_S = 60.0
_SUPERVISOR = """
import asyncio, signal, sys
from ublkpool.daemon.processes.children import Child
from ublkpool.daemon.kernel.control_process import LOOKS_MAX, CallHung, ControlFailed, ControlRunner

def hang():
    fifo = open(sys.argv[1], "w")
    print("hangs", file=fifo, flush=True)
    signal.pause()

asyncio.run(ControlRunner().run("hang", hang, type(None)))
"""


def test_a_control_command_dies_with_the_supervisor_that_started_it(tmp_path: Path) -> None:
    """A command that lived on would end the next supervisor's recovery: `COMMANDS_LIVE_ON` in the simulation."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    supervisor = subprocess.Popen([sys.executable, "-c", _SUPERVISOR, str(path)])
    try:
        with path.open() as fifo:
            assert fifo.readline() == "hangs\n"
            supervisor.send_signal(signal.SIGKILL)
            assert fifo.readline() == "", "its end of the pipe is closed, since it is dead"
    finally:
        supervisor.kill()
        supervisor.wait()


def _children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def test_a_cancelled_command_has_ended_when_the_caller_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_process, "KILL_PATIENCE_S", DEADLINE_S)

    async def run() -> None:
        before, begun = _children(), asyncio.Event()
        command = ControlRunner().run_beside("sleep", lambda: time.sleep(600), type(None), 600.0, begun)
        waiting = asyncio.ensure_future(command)
        await begun.wait()
        assert len(_children() - before) == 1
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert not _children() - before

    asyncio.run(asyncio.wait_for(run(), 2 * DEADLINE_S))


def test_a_look_has_its_result_or_the_reason_of_its_failure() -> None:
    async def run() -> None:
        runner = ControlRunner()
        assert await runner.look("vol0", "pid", os.getpid, int, DEADLINE_S) != os.getpid()
        with pytest.raises(ControlFailed, match="No such file") as caught:
            await runner.look(
                "vol0", "open", lambda: os.open("/nonexistent/file", os.O_RDONLY), int, DEADLINE_S
            )
        assert caught.value.errno == 2

    asyncio.run(run())


@pytest.mark.parametrize("length", [100, 65536, 1 << 20])
def test_an_answer_that_is_larger_than_a_pipe_arrives_whole_and_leaves_no_descriptor(length: int) -> None:
    async def run() -> None:
        runner = ControlRunner()
        before, begun = open_descriptors(), asyncio.Event()
        assert await runner.look("vol0", "text", lambda: "x" * length, str, DEADLINE_S) == "x" * length
        text = await runner.run_beside("text", lambda: "y" * length, str, DEADLINE_S, begun)
        assert text == "y" * length and begun.is_set()
        assert open_descriptors() == before

    asyncio.run(run())


def test_an_answer_over_the_bound_is_an_error_that_names_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_process, "ANSWER_BYTES_MAX", 1000)

    async def run() -> None:
        with pytest.raises(
            ControlFailed, match=r"^text: its answer has \d{4} bytes, and at most 1000 are taken$"
        ):
            await ControlRunner().look("vol0", "text", lambda: "x" * 2000, str, DEADLINE_S)

    asyncio.run(run())


@pytest.mark.parametrize("sent", [0, 1, 100_000])
def test_a_process_that_is_killed_before_its_answer_is_whole_is_an_error_that_says_so(
    monkeypatch: pytest.MonkeyPatch, sent: int
) -> None:
    def die(_: str, writer: int, raw: bytes) -> None:
        assert len(raw) > os.write(writer, raw[:sent]) == sent
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(control_process, "_send", die)

    async def run() -> None:
        before = open_descriptors()
        with pytest.raises(ControlFailed, match=r"^text: its process died without an answer$"):
            await ControlRunner().look("vol0", "text", lambda: "x" * 200_000, str, DEADLINE_S)
        assert open_descriptors() == before

    asyncio.run(run())


def test_hung_looks_are_bounded_for_each_owner_and_named_and_block_no_other_owner() -> None:
    """A process in D state ignores SIGKILL; here no signal is sent to it."""

    async def run(monkeypatch: pytest.MonkeyPatch) -> None:
        sent: list[int] = []
        monkeypatch.setattr(Child, "send", lambda child, _: sent.append(child.pid))
        runner = ControlRunner()
        hung = [
            asyncio.ensure_future(runner.look("stuck", "stuck: opening", signal.pause, type(None), 0.2))
            for _ in range(LOOKS_MAX)
        ]
        for each in await asyncio.gather(*hung, return_exceptions=True):
            assert isinstance(each, CallHung) and "stuck: opening has hung" in str(each)
        assert len(sent) == LOOKS_MAX
        try:
            with pytest.raises(ControlFailed, match=f"not tried: {LOOKS_MAX} processes wait") as caught:
                await runner.look("stuck", "stuck: opening", os.getpid, int)
            assert all(str(pid) in str(caught.value) for pid in sent)
            assert await runner.look("other", "other: opening", os.getpid, int, DEADLINE_S)
        finally:
            for pid in sent:
                os.kill(pid, signal.SIGKILL)
        while any(each.exit_status is None for each in runner._looks["stuck"]):
            await asyncio.sleep(0.01)
        again = await runner.look("stuck", "stuck: opening", os.getpid, int, DEADLINE_S)
        assert again, "the dead ones do not count"

    with pytest.MonkeyPatch.context() as monkeypatch:
        asyncio.run(asyncio.wait_for(run(monkeypatch), 2 * DEADLINE_S))


def test_a_command_runs_out_of_the_reserve_when_no_descriptor_is_left() -> None:
    async def run() -> None:
        reserve = Reserve()
        runner = ControlRunner(reserve)
        with no_descriptor_left():
            for _ in range(3):
                assert await runner.run("answer", lambda: 42, int) == 42
        reserve.close()

    asyncio.run(run())


def test_without_a_reserve_the_error_names_the_limit_and_nothing_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(control_process, "START_PATIENCE_S", 0.0)

    async def run() -> None:
        runner = ControlRunner()
        before, children = open_descriptors(), _children()
        with (
            no_descriptor_left(),
            pytest.raises(ControlFailed, match=r"STOP_DEV: no process for it: .*limit is \d+: LimitNOFILE="),
        ):
            await runner.run("STOP_DEV", lambda: 42, int)
        assert open_descriptors() == before and not _children() - children

    asyncio.run(run())


@pytest.mark.parametrize("free", [1, 2])
def test_a_process_is_not_started_without_a_descriptor_to_watch_it_by(
    monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    """One descriptor is too few for the pipe, two for the pipe and the process."""
    monkeypatch.setattr(control_process, "START_PATIENCE_S", 0.0)

    async def run() -> None:
        before, children = open_descriptors(), _children()
        spare = Reserve(free)
        with no_descriptor_left(), spare.released():
            with pytest.raises(ControlFailed, match="no process for it"):
                await ControlRunner().run("STOP_DEV", lambda: 42, int)
            assert not _children() - children
        spare.close()
        assert open_descriptors() == before

    asyncio.run(run())


def test_a_command_waits_while_no_process_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_process, "START_PAUSE_S", 0.0)
    failures = [errno.EAGAIN, errno.ENOMEM]
    really = fork_child

    def fork(*arguments: Any) -> int:
        if failures:
            code = failures.pop()
            raise OSError(code, os.strerror(code))
        return really(*arguments)

    monkeypatch.setattr(control_process, "fork_child", fork)
    before = open_descriptors()

    async def run() -> int:
        return await ControlRunner().run("answer", lambda: 42, int)

    assert asyncio.run(run()) == 42
    assert open_descriptors() == before
