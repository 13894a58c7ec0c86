"""The process that opens the node of an ordinary user's device."""

import asyncio
import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from support.fakes.device_parts import FakeKernel, FakeTeam
from support.vm.daemon import eventually_nothing
from ublkpool.daemon.device.team import Team
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.kernel.opener import SERVER_KILLED, Opener
from ublkpool.daemon.processes.children import Child
from ublkpool.daemon.processes.worker_process import WorkerProcess
from ublkpool.workers import messages
from ublkpool.workers.process import fork_child

DEADLINE_S = 30


@pytest.fixture
def node(tmp_path: Path) -> str:
    path = tmp_path / "ublkc0"
    path.write_text("node")
    return str(path)


def wait_for_ever() -> int:
    """A worker until it is killed."""
    signal.pause()
    return 0


def holders(path: str, pid: int) -> list[str]:
    """The descriptors of this process that lead to the file."""
    found = []
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            if str(each.readlink()) == path:
                found.append(each.name)
    return found


def test_the_node_is_opened_by_a_process_that_does_not_keep_it_open(node: str) -> None:
    with asyncio.Runner() as runner:
        opener, fd = runner.run(Opener.start(node, DEADLINE_S))
        try:
            assert holders(node, os.getpid()) == [str(fd)] and not os.get_inheritable(fd)
            assert opener.pid != os.getpid()
            eventually_nothing(
                lambda: holders(node, opener.pid), "the process has closed the node", DEADLINE_S
            )
        finally:
            os.close(fd)
            opener.let_end()
        runner.run(asyncio.wait_for(opener.ended(), DEADLINE_S))


def test_the_process_lives_until_the_last_worker_has_ended(node: str) -> None:
    async def test() -> None:
        opener, fd = await Opener.start(node, DEADLINE_S)
        os.close(fd)
        worker = Child(fork_child(wait_for_ever, [opener.life], "worker"))
        opener.let_end()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(opener.ended(), 0.3)
        await worker.kill()
        await asyncio.wait_for(opener.ended(), DEADLINE_S)

    asyncio.run(test())


def test_a_node_that_does_not_open_is_named(tmp_path: Path) -> None:
    async def test() -> None:
        path = str(tmp_path / "ublkc7")
        with pytest.raises(DaemonError, match=f"{path}: No such file"):
            await Opener.start(path, 0.1)

    asyncio.run(test())


def test_when_the_kernel_ends_the_process_the_workers_end_with_that_reason(node: str) -> None:
    async def test() -> None:
        kernel = FakeKernel()
        kernel.opener, fd = await Opener.start(node, DEADLINE_S)
        os.close(fd)
        ours, theirs = messages.pair()
        team = FakeTeam(kernel)
        pid = fork_child(wait_for_ever, [theirs.fileno()], "worker")
        theirs.close()
        worker = WorkerProcess(0, None, pid, ours, lambda *_: None)
        team.workers.append(worker)
        try:
            os.kill(kernel.opener.pid, signal.SIGKILL)
            ended = await asyncio.wait_for(Team.ended(team), DEADLINE_S)
            assert ended is worker and worker.obituary() == SERVER_KILLED
        finally:
            kernel.let_go()
            await worker.child.kill()
            worker.close()

    asyncio.run(test())
