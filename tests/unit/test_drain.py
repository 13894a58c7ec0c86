"""Draining a device and resuming it, step by step, on made-up parts: each refusal, each failure, each order."""

import asyncio
import errno
import os
from collections.abc import Callable
from typing import Any, cast

import msgspec
import pytest

from support.fakes.device_parts import (
    SIZE_BYTES,
    FakeSession,
    fake_device,
    turn,
)
from support.fakes.drain_scene import (
    CACHED,
    HeldTeam,
    Scene,
    in_loop,
)
from ublkpool.bufpool import wire
from ublkpool.bufpool.errors import AttachRefused
from ublkpool.daemon.device.drain import cancel
from ublkpool.daemon.device.records import NotRecorded
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.workers.record_gate import look_at_gate


def test_a_device_is_drained_in_an_order_that_any_death_may_interrupt() -> None:
    async def run() -> None:
        scene = await Scene(managed=True).begin()
        await scene.device.drain(True, None)
        assert scene.steps == [
            "hold True",
            "flush",
            "record drained, gate closed",
            "record drained",
            "not started again",
            "detach, keep True",
            "lost",
            "process ended",
        ]
        assert scene.device.session is None and scene.parts.resources.holds
        status = scene.device.status()
        assert (status.state, status.drain, status.backend.pid) == ("live", "drained", None)
        assert status.reason == "drained: requests wait for: ublkpool resume vol"

    in_loop(run)


def test_a_drained_device_takes_no_backend_until_it_is_resumed() -> None:
    async def run() -> None:
        scene = await Scene(managed=True).begin()
        await scene.device.drain(True, None)
        await scene.device.drain(True, None)
        with pytest.raises(AttachRefused, match=r"^device vol is drained: ublkpool resume vol first$"):
            await scene.device.attach(FakeSession())
        scene.steps.clear()
        await scene.device.resume()
        assert scene.steps == ["record no drain", "release", "started"]
        await scene.device.attach(FakeSession())
        assert scene.device.status().drain == "" and not scene.parts.resources.holds

    in_loop(run)


def test_a_disk_that_caches_nothing_and_a_caller_that_wants_none_need_no_flush() -> None:
    async def run() -> None:
        for flush, disk in ((False, CACHED), (True, msgspec.structs.replace(CACHED, volatile_cache=False))):
            scene = await Scene().begin()
            scene.parts.resources.disk = disk
            await scene.device.drain(flush, None)
            assert "flush" not in scene.steps and scene.parts.drain == "drained"

    in_loop(run)


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (-errno.EIO, "vol: not drained: its backend answered the FLUSH with Input/output error"),
        (-errno.ENOTCONN, "vol: not drained: its backend ended before it confirmed a FLUSH; try again"),
    ],
)
def test_a_device_whose_store_may_not_be_whole_goes_on(result: int, reason: str) -> None:
    async def run() -> None:
        scene = await Scene().begin()
        scene.team.result = result
        with pytest.raises(DaemonError, match=f"^{reason}$"):
            await scene.device.drain(True, None)
        assert scene.steps == ["hold True", "flush", "release"]
        assert scene.parts.drain == "" and not scene.parts.resources.holds

    in_loop(run)


def test_without_a_backend_only_a_drain_without_a_flush_is_possible() -> None:
    async def run() -> None:
        scene = await Scene(attached=False).begin()
        with pytest.raises(DaemonError, match="no backend is attached that could confirm a FLUSH"):
            await scene.device.drain(True, None)
        await scene.device.drain(False, None)
        assert scene.parts.drain == "drained"

    in_loop(run)


def test_a_drain_that_takes_too_long_is_given_up() -> None:
    async def run() -> None:
        scene = await Scene(quiet=False).begin()
        with pytest.raises(DaemonError, match=r"not finished its requests after 0.01 s$") as given_up:
            await scene.device.drain(True, 0.01)
        assert given_up.value.code == "timeout"
        assert scene.steps == ["hold True", "release"] and scene.parts.drain == ""
        assert scene.device.session is not None

    in_loop(run)


def test_a_drain_whose_client_has_gone_is_given_up() -> None:
    async def run() -> None:
        scene = await Scene(quiet=False).begin()
        draining = asyncio.ensure_future(scene.device.drain(True, None))
        await turn()
        assert scene.device.status().drain == "draining"
        with pytest.raises(DaemonError, match="being drained already"):
            await scene.device.drain(True, None)
        with pytest.raises(DaemonError, match="interrupt that command instead"):
            await scene.device.resume()
        draining.cancel()
        await asyncio.wait({draining})
        assert draining.cancelled() and scene.steps == ["hold True", "release"]

    in_loop(run)


def test_a_deletion_ends_a_drain_and_says_so_to_its_client() -> None:
    async def run() -> None:
        scene = await Scene(quiet=False).begin()
        draining = asyncio.ensure_future(scene.device.drain(True, None))
        await turn()
        await cancel(scene.parts)
        with pytest.raises(DaemonError, match="it is being deleted, or the machine goes down"):
            await draining
        assert scene.steps == ["hold True", "release"]

    in_loop(run)


def test_a_drain_that_is_cancelled_twice_before_its_record_still_holds_for_good() -> None:
    """The step that puts it on record waits for the device's turn; the second cancellation ends the wait for it."""

    async def run() -> None:
        scene = await Scene(quiet=False).begin()
        scene.team.workers = [cast(Any, "a worker")]
        draining = asyncio.ensure_future(scene.device.drain(True, None))
        await turn()
        gate, task = scene.parts.resources.hold_gate, scene.parts.draining
        assert gate is not None and task is not None
        reader = os.dup(gate.reader)
        os.set_blocking(reader, False)
        async with scene.parts.life.turn:
            scene.team.is_quiet.set()
            await turn()
            for _ in range(2):
                task.cancel()
                await turn()
            await asyncio.wait({draining})
            assert look_at_gate(reader) == "closed", "no worker lets go of what is about to be drained"
        await turn()
        assert (scene.parts.drain, look_at_gate(reader)) == ("drained", "open")
        os.close(reader)

    in_loop(run)


def test_a_drain_that_is_given_up_closes_its_gate() -> None:
    async def run() -> None:
        scene = await Scene(quiet=False).begin()
        draining = asyncio.ensure_future(scene.device.drain(True, None))
        await turn()
        gate = scene.parts.resources.hold_gate
        assert gate is not None
        reader = os.dup(gate.reader)
        draining.cancel()
        await asyncio.wait({draining})
        assert scene.parts.resources.hold_gate is None and look_at_gate(reader) == "ended"
        os.close(reader)

    in_loop(run)


def test_a_client_that_goes_once_the_backend_leaves_does_not_stop_it() -> None:
    async def run() -> None:
        scene = await Scene().begin()

        def save() -> None:
            scene.steps.append("record")
            draining.cancel()

        scene.parts.save = save  # type: ignore[method-assign]
        draining = asyncio.ensure_future(scene.device.drain(True, None))
        await asyncio.wait({draining})
        await turn()
        assert scene.parts.drain == "drained" and scene.device.session is None
        assert scene.steps == ["hold True", "flush", "record", "record", "detach, keep True", "lost"]

    in_loop(run)


def test_a_drain_that_cannot_be_recorded_leaves_the_backend_there() -> None:
    async def run() -> None:
        scene = await Scene().begin()

        def save() -> None:
            raise NotRecorded("no room")

        scene.parts.save = save  # type: ignore[method-assign]
        with pytest.raises(NotRecorded, match="no room"):
            await scene.device.drain(True, None)
        assert scene.steps == ["hold True", "flush", "release"]
        assert scene.parts.drain == "" and scene.device.session is not None

    in_loop(run)


def test_a_resume_that_cannot_be_recorded_leaves_the_device_drained() -> None:
    async def run() -> None:
        scene = await Scene(managed=True).begin()
        await scene.device.drain(True, None)
        scene.steps.clear()

        def save() -> None:
            raise NotRecorded("no room")

        scene.parts.save = save  # type: ignore[method-assign]
        with pytest.raises(NotRecorded, match="no room"):
            await scene.device.resume()
        assert scene.steps == [] and scene.parts.drain == "drained" and scene.parts.resources.holds

    in_loop(run)


def test_a_drain_goes_on_with_the_workers_that_follow_dead_ones() -> None:
    async def run() -> None:
        scene = await Scene(quiet=False).begin()
        draining = asyncio.ensure_future(scene.device.drain(True, None))
        await turn()
        async with scene.parts.life.turn:
            scene.parts.enter("recovering")
            scene.team.ends()
            await turn()
            assert not draining.done()
            scene.parts.resources.team = HeldTeam(scene.steps)
            scene.parts.enter("live")
        await draining
        assert scene.parts.drain == "drained"
        assert scene.steps.count("flush") == 1 and scene.steps.count("hold True") == 2

    in_loop(run)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: setattr(s.parts.life, "is_stopping", True), "it is being deleted"),
        (lambda s: setattr(s.parts.life, "state", "failed"), "it has failed and has no disk"),
        (lambda s: setattr(s.parts.life, "state", "recovering"), "it is recovering, not live"),
        (lambda s: setattr(s.parts.life, "state", "waiting"), "it is waiting, not live"),
        (lambda s: setattr(s.team, "knows", False), "its workers run an earlier version"),
        (
            lambda s: setattr(
                s.device.session, "attach", wire.Attach(v=1, device="vol", kind="x", survives_death=False)
            ),
            "its data ends with the process of its backend",
        ),
    ],
)
def test_a_device_that_cannot_be_drained_says_why(change: Callable[[Scene], None], reason: str) -> None:
    async def run() -> None:
        scene = await Scene().begin()
        change(scene)
        with pytest.raises(DaemonError, match=f"^vol: {reason}"):
            await scene.device.drain(True, None)
        assert scene.steps == [] and scene.parts.drain == ""

    in_loop(run)


def test_workers_that_answer_have_no_backend_to_exchange() -> None:
    async def run() -> None:
        device = fake_device(DeviceConfig(name="vol", size_bytes=SIZE_BYTES, answers="worker"))
        with pytest.raises(DaemonError, match="its workers answer requests"):
            await device.drain(True, None)

    in_loop(run)


def test_a_device_that_is_not_drained_is_not_resumed() -> None:
    async def run() -> None:
        scene = await Scene().begin()
        with pytest.raises(DaemonError, match=r"^vol: it is not drained$"):
            await scene.device.resume()
        assert scene.steps == []

    in_loop(run)


def test_a_drained_device_that_has_failed_is_neither_drained_nor_resumed() -> None:
    """Its backend would be refused, and started again until the device is deleted."""

    async def run() -> None:
        scene = await Scene(managed=True).begin()
        await scene.device.drain(True, None)
        scene.device.note_failure("no disk")
        scene.steps.clear()
        with pytest.raises(DaemonError, match=r"^vol: it has failed: no disk$"):
            await scene.device.resume()
        with pytest.raises(DaemonError, match=r"^vol: not drained: no disk$"):
            await scene.device.drain(True, None)
        await scene.device.end_drain()
        assert scene.steps == []

    in_loop(run)
