"""Fixtures that several unit tests share."""

import pytest
from hypothesis import HealthCheck, settings

from support.fake_worker import FakeWorker
from ublkpool.bufpool.ring_driver import DriverStatistics, RingDriver

# A busy machine is slow, and hypothesis would take a slow example for a failure.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(params=["zeromq", "ring"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What fake workers offer to backends: a test that asks for it runs over both."""
    monkeypatch.setattr(FakeWorker, "transport", request.param)
    return str(request.param)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[DriverStatistics]:
    """What every loop has counted when it ends."""
    counted: list[DriverStatistics] = []
    close = RingDriver.close

    def counting(self: RingDriver) -> None:
        counted.append(self.statistics())
        close(self)

    monkeypatch.setattr(RingDriver, "close", counting)
    return counted
