"""A drained device over a resume, an upgrade, the machine's shutdown and the next daemon."""

import asyncio

import msgspec
import pytest

from support.fakes.device_parts import (
    FakeChild,
    FakeSession,
    FakeWorkerProcess,
    fake_context,
    fake_device,
    turn,
)
from support.fakes.drain_scene import (
    Scene,
    in_loop,
)
from ublkpool.bufpool.errors import AttachRefused
from ublkpool.daemon.device.records import Record
from ublkpool.daemon.device.table import Show
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.processes.background import Background
from ublkpool.daemon.settings.config import Recovery
from ublkpool.daemon.supervisor import Supervisor
from ublkpool.workers import messages


def test_a_resumed_devices_requests_wait_until_a_backend_is_absent_for_long_again() -> None:
    async def run() -> None:
        device = (await Scene(attached=False).begin()).device
        worker = FakeWorkerProcess(0, FakeChild())
        for _ in range(2):
            device.parts.backend.hear(worker, messages.Absent())
            assert device.trouble == "no backend is attached, requests fail"
            await device.drain(False, None)
            await device.resume()
            assert device.trouble == "no backend is attached, requests wait"
        lines = device.parts.context.events.after(0, most=1000).lines
        assert sum(b"requests-fail" in line for line in lines) == 2

    in_loop(run)


@pytest.mark.parametrize(("recovery", "waits"), [("reissue", False), ("abort", True), ("fail", True)])
def test_an_upgrade_replaces_a_drained_devices_workers_only_if_the_driver_keeps_their_requests(
    monkeypatch: pytest.MonkeyPatch, recovery: Recovery, waits: bool
) -> None:
    async def run() -> None:
        scene = await Scene().begin()
        scene.parts.use(msgspec.structs.replace(scene.parts.config, recovery=recovery))

        async def retire(*_: object) -> None:
            scene.steps.append("retired")

        async def next_epoch() -> str:
            return ""

        monkeypatch.setattr("ublkpool.daemon.device.device.retire", retire)
        monkeypatch.setattr(scene.device, "_try_next_epoch", next_epoch)
        await scene.device.drain(True, None)
        await scene.device.renew()
        await turn()
        assert ("retired" in scene.steps) != waits and scene.device.state == ("live" if waits else "quiesced")
        scene.parts.enter("live")
        await scene.device.resume()
        await turn()
        assert scene.steps.count("retired") == (not waits), "its requests wait for the next backend"
        await scene.device.attach(FakeSession())
        await turn()
        assert scene.steps.count("retired") == 1

    in_loop(run)


def test_the_machines_shutdown_resumes_a_drained_device_and_ends_a_drain() -> None:
    """Dirty data of a mounted file system must still find a backend."""

    async def run() -> None:
        drained = await Scene(managed=True).begin()
        await drained.device.drain(True, None)
        await drained.device.end_drain()
        assert drained.parts.drain == "" and drained.steps[-2:] == ["release", "started"]
        draining = await Scene(quiet=False).begin()
        asking = asyncio.ensure_future(draining.device.drain(True, None))
        await turn()
        await draining.device.end_drain()
        await asyncio.wait({asking})
        assert draining.parts.drain == "" and draining.steps == ["hold True", "release"]

    in_loop(run)


def test_the_machines_shutdown_resumes_a_device_whose_takeover_ends_later() -> None:
    async def run() -> None:
        supervisor = Supervisor(fake_context(), Background("the daemon"))
        is_taken = asyncio.Event()
        scene = await Scene(managed=True, attached=False).begin()
        scene.parts.hold("drained")

        async def work(show: Show) -> bool:
            await is_taken.wait()
            # As after a `go_on` that failed: another `Device` stands for the name from now on.
            show(scene.device)
            return True

        record = Record(config=scene.device.config, device_number=3, drained=True)
        taking = supervisor._table.take_over(record, work)
        left = supervisor._table.device("vol")
        await supervisor.shut_down(final=False)
        await turn()
        assert scene.device.status().drain == "drained" and scene.steps == []
        assert not left.lacks_backend, "its dirty data fails before it was resumed"
        is_taken.set()
        await taking
        await turn()
        assert scene.device.status().drain == "" and scene.steps == ["record no drain", "release", "started"]
        assert scene.device.lacks_backend
        supervisor._background.cancel()

    in_loop(run)


def test_the_machines_shutdown_waits_for_no_device_that_is_gone() -> None:
    async def run() -> None:
        supervisor = Supervisor(fake_context(), Background("the daemon"))

        async def work(_show: Show) -> bool:
            await turn()
            return False

        record = Record(config=fake_device().config, device_number=3, drained=True)
        taking = supervisor._table.take_over(record, work)
        await supervisor.shut_down(final=False)
        await taking
        await turn()
        assert await supervisor._table.at_rest("vol") is None
        supervisor._background.cancel()

    in_loop(run)


def test_the_next_daemon_finds_a_drained_device_drained_and_resumes_none_during_its_takeover() -> None:
    async def run() -> None:
        device = fake_device()
        device.await_takeover(Record(config=device.config, device_number=3, drained=True))
        assert device.parts.drain == "drained" and device.parts.resources.holds
        with pytest.raises(AttachRefused, match="is drained"):
            await device.attach(FakeSession())
        with pytest.raises(DaemonError, match="taken over"):
            await device.resume()

    in_loop(run)
