"""The process that opens the node of an ordinary user's device."""

import asyncio
import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from support.fakes.device_parts import FakeHolder, FakeKernel, FakeParts, FakeTeam, fake_context
from support.vm.daemon import eventually_nothing
from ublkpool.bufpool.errors import PoolError
from ublkpool.bufpool.pool.arena import Arena
from ublkpool.daemon.device.records import Record
from ublkpool.daemon.device.succession import AdoptedDevice
from ublkpool.daemon.device.team import Team
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.kernel.opener import SERVER_KILLED, Opener
from ublkpool.daemon.processes.children import Child
from ublkpool.daemon.processes.held_names import opener_names
from ublkpool.daemon.processes.worker_process import WorkerProcess
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.ublk.abi import Feature
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


def held_of(opener: Opener) -> dict[str, int]:
    """What the holder has of it for the next daemon."""
    holder = KeptHolder()
    opener.hold("vol", holder)
    return holder.kept


class KeptHolder(FakeHolder):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, int] = {}

    def hold(self, name: str, fd: int) -> None:
        super().hold(name, fd)
        self.kept[name] = os.dup(fd)


def close_all(held: dict[str, int]) -> None:
    for fd in held.values():
        os.close(fd)


def test_the_next_daemon_watches_the_process_and_keeps_it_alive(node: str) -> None:
    async def test() -> None:
        first, fd = await Opener.start(node, DEADLINE_S)
        os.close(fd)
        held = held_of(first)
        opener = Opener.adopt("vol", held)
        assert opener is not None and opener.pid == first.pid
        close_all(held)
        # The daemon before has ended, and there is no worker any more.
        first.let_end()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(opener.ended(), 0.3)
        opener.let_end()
        await asyncio.wait_for(opener.ended(), DEADLINE_S)

    asyncio.run(test())


@pytest.mark.parametrize("is_early", [True, False])
def test_the_next_daemon_sees_that_the_process_was_killed_also_before_it_came(
    node: str, is_early: bool
) -> None:
    async def test() -> None:
        first, fd = await Opener.start(node, DEADLINE_S)
        os.close(fd)
        held = held_of(first)
        if is_early:
            os.kill(first.pid, signal.SIGKILL)
            await asyncio.wait_for(first.ended(), DEADLINE_S)
        opener = Opener.adopt("vol", held)
        close_all(held)
        assert opener is not None and (opener.pid == -1) == is_early
        if not is_early:
            os.kill(first.pid, signal.SIGKILL)
        await asyncio.wait_for(opener.ended(), DEADLINE_S)
        assert held_of(opener) == {}, "the number of its descriptor may be another one's"
        opener.let_end()
        first.let_end()

    asyncio.run(test())


def test_a_daemon_before_this_one_that_held_no_process_leaves_none_to_watch() -> None:
    assert Opener.adopt("vol", {}) is None
    assert Opener.adopt("vol", {"vol/opener": 0, "other/opener/life": 0}) is None


@pytest.mark.parametrize("flags", [Feature.UNPRIVILEGED_DEV, Feature(0)])
def test_a_device_goes_on_with_the_process_and_gives_it_up_with_the_kernels_device(
    node: str, monkeypatch: pytest.MonkeyPatch, flags: Feature
) -> None:
    def no_arena(*_: object) -> Arena:
        raise PoolError("no pool")

    async def test() -> None:
        first, fd = await Opener.start(node, DEADLINE_S)
        os.close(fd)
        held = held_of(first)
        kernel = FakeKernel()
        kernel.info = kernel.info._replace(flags=flags)
        parts = FakeParts(DeviceConfig(name="vol"), fake_context())
        resources, holder = parts.resources, parts.context.holder
        monkeypatch.setattr(Arena, "open", no_arena)
        with pytest.raises(PoolError):
            await resources.adopt(AdoptedDevice(kernel, (), Record(config=parts.config), held), None)
        close_all(held)
        first.let_end()
        assert (kernel.opener is not None) == bool(flags)
        resources.hold_workers(FakeTeam(kernel))
        assert isinstance(holder, FakeHolder)
        assert holder.held == (set(opener_names("vol")) if flags else set())
        await resources.remove_kernel()
        assert not holder.held
        # Neither daemon keeps it alive.
        await asyncio.wait_for(first.ended(), DEADLINE_S)

    asyncio.run(test())
