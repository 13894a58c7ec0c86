"""Fixtures that several unit tests share."""

import logging
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from support.fakes.worker import FakeWorker
from ublkpool.bufpool.engine.ring_driver import DriverStatistics, RingDriver

# On a busy machine hypothesis would report a slow example as a failure.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def loggers() -> Iterator[None]:
    """Restore the logging configuration after a test that changes it, as every command does."""
    kept = [
        (each, each.handlers[:], each.propagate, each.level)
        for each in map(logging.getLogger, ("ublkpool", "asyncio"))
    ]
    yield
    for logger, handlers, propagate, level in kept:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture(params=["zeromq", "ring"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The transport that fake workers offer to backends; a test with this fixture runs once over each."""
    monkeypatch.setattr(FakeWorker, "transport", request.param)
    return str(request.param)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[DriverStatistics]:
    """The counters of every loop at its end."""
    counted: list[DriverStatistics] = []
    close = RingDriver.close

    def counting(self: RingDriver) -> None:
        counted.append(self.statistics())
        close(self)

    monkeypatch.setattr(RingDriver, "close", counting)
    return counted
