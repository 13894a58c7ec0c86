"""Ending the keeper of a deleted device's memory, while the supervisor's loop goes on."""

import asyncio
import socket
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from ublkpool.bufpool.sdk.client import OwnSegment
from ublkpool.bufpool.sdk.keeper import DROP, Keeper
from ublkpool.daemon.device import kept_memory
from ublkpool.daemon.device.kept_memory import drop_kept

DEADLINE_S = 60


def run(scene: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scene, DEADLINE_S))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "memory-vol0.keep"


@pytest.fixture
def mute(path: Path) -> Iterator[socket.socket]:
    """A keeper that hangs."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen(0)
        yield listener


def test_without_a_keeper_the_call_returns_at_once(path: Path) -> None:
    run(drop_kept(path))
    path.touch()
    run(drop_kept(path))


def test_a_keeper_ends(path: Path) -> None:
    segment = OwnSegment.create(4096)
    keeper = Keeper(path)
    keeper.keep(segment)
    run(drop_kept(path))
    assert keeper.adopt() is None
    segment.close()


def test_the_loop_goes_on_while_a_keeper_hangs(path: Path, mute: socket.socket) -> None:
    async def scene() -> None:
        dropping = asyncio.ensure_future(drop_kept(path))
        accepted, _ = await asyncio.to_thread(mute.accept)
        assert await asyncio.to_thread(accepted.recv, 16) == DROP
        for _ in range(100):
            await asyncio.sleep(0)
        assert not dropping.done()
        accepted.close()
        await dropping

    run(scene())


def test_the_loop_goes_on_while_too_many_others_wait_for_a_keeper(path: Path, mute: socket.socket) -> None:
    others = []
    with pytest.raises(BlockingIOError):
        while True:
            others.append(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK))
            others[-1].connect(str(path))
    others.pop().close()

    async def scene() -> None:
        dropping = asyncio.ensure_future(drop_kept(path))
        for _ in range(100):
            await asyncio.sleep(0)
        assert not dropping.done()
        for _ in others:
            (await asyncio.to_thread(mute.accept))[0].close()
        accepted, _ = await asyncio.to_thread(mute.accept)
        assert await asyncio.to_thread(accepted.recv, 16) == DROP
        accepted.close()
        await dropping

    run(scene())
    for each in others:
        each.close()


def test_a_keeper_that_never_answers_is_left_alone(
    path: Path, mute: socket.socket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kept_memory, "PATIENCE_S", 0.05)
    monkeypatch.setattr(kept_memory._log.parent, "propagate", True)
    run(drop_kept(path))
    assert "does not answer" in caplog.text and str(path) in caplog.text
