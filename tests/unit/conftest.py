"""Fixtures that several unit tests share."""

import logging
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from support.fakes.worker import FakeWorker
from support.nbdkit.plugins import Plugin
from ublkpool.bufpool.engine.ring_driver import DriverStatistics, RingDriver
from ublkpool.bufpool.sdk import loader
from ublkpool.bufpool.sdk.failures import failures
from ublkpool.bufpool.sdk.nbdkit.plugin import NbdkitBackend
from ublkpool.daemon import logs

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
    levels = [(each, each.level) for each in map(logging.getLogger, ("", *logs._CHATTY))]
    yield
    for logger, handlers, propagate, level in kept:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)
    for logger, level in levels:
        logger.setLevel(level)
    # pytest's own handlers come and go with each phase of a test.
    root = logging.getLogger()
    root.handlers[:] = [each for each in root.handlers if not isinstance(each, logs._Handler)]
    logging.captureWarnings(False)


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


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[Plugin]:
    """Loads the code of a plugin with its options."""
    loaded = []
    failures.forget()

    def load(*code: str, **options: str | list[str]) -> NbdkitBackend:
        path = tmp_path / "plugin.py"
        path.write_text("".join(map(textwrap.dedent, code)))
        backend = loader.load(str(path), options)
        assert isinstance(backend, NbdkitBackend)
        loaded.append(backend)
        return backend

    yield load
    for each in reversed(loaded):
        each.close()
