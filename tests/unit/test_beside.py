"""A task beside a block ends with the block, and its failure is raised or logged."""

import asyncio
import logging

import pytest

from ublkpool.daemon.processes.beside import beside


class Work:
    """Runs until it is cancelled, and needs a moment to end."""

    has_ended = False

    async def run(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            self.has_ended = True


async def fail() -> None:
    raise OSError("no more descriptors")


def test_the_task_has_ended_when_the_block_is_over() -> None:
    async def run() -> None:
        work = Work()
        async with beside(work.run()):
            await asyncio.sleep(0)
        assert work.has_ended

    asyncio.run(run())


def test_the_task_has_ended_when_the_block_fails_or_is_cancelled() -> None:
    async def run() -> None:
        failing, cancelled = Work(), Work()
        with pytest.raises(ValueError):
            async with beside(failing.run()):
                await asyncio.sleep(0)
                raise ValueError
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01), beside(cancelled.run()):
                await asyncio.Event().wait()
        assert failing.has_ended and cancelled.has_ended

    asyncio.run(run())


def test_a_failure_that_the_block_did_not_see_is_raised_at_its_end() -> None:
    async def run() -> None:
        with pytest.raises(OSError, match="no more descriptors"):
            async with beside(fail()):
                await asyncio.sleep(0)

    asyncio.run(run())


def test_a_failure_beside_another_is_logged_and_the_block_s_own_is_raised(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def run() -> None:
        async with beside(fail()) as task:
            await asyncio.wait({task})
            raise ValueError

    with caplog.at_level(logging.WARNING), pytest.raises(ValueError):
        asyncio.run(run())
    assert "no more descriptors" in caplog.text
