"""The backend of a drained device takes its time to leave: until then the device is not said to be drained."""

import asyncio

import pytest

from support.fakes.device_parts import (
    turn,
)
from support.fakes.drain_scene import (
    Scene,
    SlowSession,
    in_loop,
    leaving,
)
from ublkpool.daemon.device.parts import DeviceParts
from ublkpool.daemon.device.records import Record
from ublkpool.daemon.device.team import Team
from ublkpool.daemon.errors import DaemonError


def test_a_device_whose_backend_still_leaves_is_not_said_to_be_drained() -> None:
    """The store may be copied only after the backend's last write."""

    async def run() -> None:
        scene = await Scene(managed=True, attached=False).begin()
        session = await leaving(scene)
        again = asyncio.ensure_future(scene.device.drain(True, None))
        await turn()
        assert not again.done() and scene.device.session is session
        session.dies()
        await again
        assert scene.steps[-2:] == ["lost", "process ended"] and scene.device.session is None

    in_loop(run)


def test_a_resume_starts_the_next_backend_only_after_the_earlier_one_has_left() -> None:
    async def run() -> None:
        scene = await Scene(managed=True, attached=False).begin()
        session = await leaving(scene)
        resuming = asyncio.ensure_future(scene.device.resume())
        ending = asyncio.ensure_future(scene.device.end_drain())
        again = asyncio.ensure_future(scene.device.drain(True, None))
        await turn()
        assert scene.parts.drain == "drained" and not (resuming.done() or ending.done() or again.done())
        session.dies()
        await asyncio.wait({resuming, ending, again})
        assert scene.steps[-5:] == ["lost", "process ended", "record no drain", "release", "started"]
        with pytest.raises(DaemonError, match=r"^vol: not drained: it was resumed meanwhile$"):
            await again

    in_loop(run)


def test_a_deletion_while_the_backend_leaves_is_told_to_the_next_drain() -> None:
    async def run() -> None:
        scene = await Scene(attached=False).begin()
        await leaving(scene)
        again = asyncio.ensure_future(scene.device.drain(True, None))
        await turn()
        scene.parts.life.is_stopping = True
        scene.parts.background.cancel()
        with pytest.raises(DaemonError, match="not drained: it is being deleted"):
            await again

    in_loop(run)


def test_the_next_daemon_says_drained_only_once_the_earlier_ones_backend_has_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run() -> None:
        scene = Scene(managed=True, attached=False)
        session = SlowSession(scene.steps)
        record = Record(config=scene.device.config, device_number=3, drained=True)

        async def go_on(parts: DeviceParts, *_: object) -> Team:
            parts.backend.session = session
            return scene.team

        async def learn(*_: object) -> None:
            """No store is known."""

        monkeypatch.setattr("ublkpool.daemon.device.adoption.go_on", go_on)
        monkeypatch.setattr("ublkpool.daemon.device.adoption.learn", learn)
        scene.device.await_takeover(record)
        with pytest.raises(
            DaemonError, match=r"^vol: it is being taken over from an earlier daemon: try again$"
        ):
            await scene.device.drain(True, None)
        await scene.device.go_on(record, {})
        again = asyncio.ensure_future(scene.device.drain(True, None))
        resuming = asyncio.ensure_future(scene.device.resume())
        await turn()
        assert not again.done() and not resuming.done() and scene.parts.drain == "drained"
        session.dies()
        await again
        await resuming
        assert scene.steps.index("process ended") < scene.steps.index("started")

    in_loop(run)
