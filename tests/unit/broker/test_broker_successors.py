"""A new pool broker is told each device once, whatever dies meanwhile; an adopted one knows its devices."""

import asyncio
import socket
import subprocess

import msgspec
import pytest

from support.fakes.device_parts import (
    FakeBrokerChannel,
    FakeChild,
    FakeHolder,
    fake_device,
    turn,
)
from ublkpool.bufpool.errors import PoolError
from ublkpool.bufpool.pool import broker_commands
from ublkpool.daemon.processes import broker_process
from ublkpool.daemon.processes.broker_process import HELD, HELD_PROCESS, BrokerProcess, Leases

DEADLINE_S = 60


class NotingBroker(BrokerProcess):
    """A broker process that notes its commands, or is dead."""

    def __init__(self) -> None:
        self.generation = self.adopted_generation = 1
        self.dead = False
        self.heard: list[str] = []
        self.turn = asyncio.Event()
        self.turn.set()

    async def command(self, command: broker_commands.Command, fd: int | None = None) -> broker_commands.Reply:
        await self.turn.wait()
        if self.dead:
            raise PoolError("the pool broker is gone")
        self.heard.append(f"{type(command).__name__} {getattr(command, 'epoch', '')}".strip())
        return broker_commands.Done()

    def restart(self) -> None:
        self.generation += 1
        self.dead = False
        self.heard.clear()


def leases(of: NotingBroker) -> Leases:
    return Leases(of, 7, 2, 0)


def test_a_new_broker_is_told_the_device_and_its_last_epoch_once() -> None:
    async def run() -> None:
        fake = NotingBroker()
        device = leases(fake)
        await device.register(1)
        assert fake.heard == ["AddDevice", "Register 1", "Register 1"]
        fake.restart()
        await asyncio.gather(device.refresh(), device.refresh())
        assert fake.heard == ["AddDevice", "Register 1", "Register 1"]
        await device.reclaim()
        await device.register(2)
        assert fake.heard[3:] == ["Reclaim 1", "Reclaim 1", "Register 2", "Register 2"]

    asyncio.run(run())


def test_an_adopted_broker_is_told_nothing_and_its_successor_everything() -> None:
    async def run() -> None:
        fake = NotingBroker()
        device = Leases(fake, 7, 2, 0, known=3)
        await device.refresh()
        assert fake.heard == []
        fake.restart()
        await device.refresh()
        assert fake.heard == ["AddDevice", "Register 3", "Register 3"]

    asyncio.run(run())


def test_an_answer_to_an_earlier_daemon_is_dropped() -> None:
    async def run() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for stale in (
            broker_commands.Done(slots=7),
            broker_commands.Failed("was not so"),
            broker_commands.Pong(1),
        ):
            theirs.send(msgspec.json.encode(stale))
        holder = FakeHolder()
        process = BrokerProcess("ipc://nowhere", holder)
        with subprocess.Popen(["/bin/sleep", "600"]) as running:
            adopting = asyncio.ensure_future(process.adopt(running.pid, ours))
            await turn()
            question = msgspec.json.decode(theirs.recv(4096), type=broker_commands.Ping)
            theirs.send(msgspec.json.encode(broker_commands.Pong(question.number)))
            assert await adopting and holder.held == {HELD_PROCESS, HELD}
            holder.drop("broker")
            assert holder.held == {HELD_PROCESS, HELD}, "a device called broker is another thing"
            running.kill()
        theirs.close()
        ours.close()

    asyncio.run(asyncio.wait_for(run(), DEADLINE_S))


def test_the_successor_of_a_broker_that_died_during_its_commands_gets_all_of_them() -> None:
    async def run() -> None:
        fake = NotingBroker()
        device = leases(fake)
        fake.dead = True
        with pytest.raises(PoolError):
            await device.register(1)
        fake.restart()
        await device.refresh()
        await device.register(1)
        assert fake.heard == ["AddDevice", "Register 1", "Register 1"]

    asyncio.run(run())


def test_a_broker_knows_of_a_device_when_it_has_answered_all_that_it_is_told() -> None:
    async def run() -> None:
        fake = NotingBroker()
        device = leases(fake)
        assert not device.are_told
        await device.register(1)
        assert device.are_told
        fake.restart()
        assert not device.are_told
        fake.dead = True
        with pytest.raises(PoolError):
            await device.refresh()
        assert not device.are_told
        fake.restart()
        fake.turn.clear()
        telling = asyncio.ensure_future(device.refresh())
        await turn()
        assert not device.are_told
        fake.turn.set()
        await telling
        assert device.are_told and Leases(fake, 7, 2, 0, known=1).are_told is False
        fake.adopted_generation = fake.generation
        assert Leases(fake, 7, 2, 0, known=1).are_told

    asyncio.run(run())


def test_a_record_names_the_broker_when_that_knows_of_the_device() -> None:
    async def run() -> None:
        parts, broker = fake_device().parts, NotingBroker()
        parts.context.broker, broker.child = broker, FakeChild(pid=7)
        assert parts._broker_pid() == 7, "the device has no buffers"
        parts.resources.leases = leases(broker)
        assert parts._broker_pid() is None
        await parts.resources.leases.register(1)
        assert parts._broker_pid() == 7

    asyncio.run(run())


def test_a_new_broker_is_not_told_of_a_device_that_is_gone() -> None:
    async def run() -> None:
        fake = NotingBroker()
        device = leases(fake)
        await device.register(1)
        fake.turn.clear()
        closing = asyncio.ensure_future(device.close())
        await turn()
        fake.generation += 1
        telling = asyncio.ensure_future(device.refresh())
        fake.turn.set()
        await asyncio.gather(closing, telling)
        assert fake.heard[-1] == "RemoveDevice"

    asyncio.run(run())


def test_a_broker_that_dies_while_it_is_told_its_devices_is_started_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(broker_process, "RESTART_MIN_S", 0.0)

    async def run() -> None:
        lives: asyncio.Queue[asyncio.Future[int]] = asyncio.Queue()
        never = asyncio.get_running_loop().create_future()

        def start(process: BrokerProcess) -> None:
            life = asyncio.get_running_loop().create_future()
            process._channel = FakeBrokerChannel()
            process.child = FakeChild(ended=life)
            process.generation += 1
            lives.put_nowait(life)

        monkeypatch.setattr(BrokerProcess, "_start", start)
        process = BrokerProcess("ipc://nowhere", FakeHolder())
        process.start()

        async def tell() -> None:
            await never

        restarting = asyncio.ensure_future(process.keep_running(tell))
        for _ in range(3):
            (await lives.get()).set_result(137)
        await lives.get()
        assert process.generation == 4
        restarting.cancel()

    asyncio.run(asyncio.wait_for(run(), DEADLINE_S))
