"""One daemon for all tests of a session, and a check after every test that it left nothing behind."""

import subprocess
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from support.vm.daemon import WARM, Daemon, eventually_nothing
from support.vm.health import KernelLog, expect_no_stuck_task
from ublkpool.daemon.errors import DaemonError

_DAEMON: pytest.StashKey[Daemon] = pytest.StashKey()
_LOG_START: pytest.StashKey[int] = pytest.StashKey()


@pytest.fixture(scope="session", autouse=True)
def warm_starts() -> Iterator[None]:
    """The process from which daemons and backends are forked, which saves most of their start."""
    WARM.begin()
    yield
    WARM.end()


@pytest.fixture(scope="session")
def session_daemon() -> Iterator[Daemon]:
    """The daemon of the session; its end must leave nothing behind."""
    daemon = Daemon()
    try:
        # As users start it, with an interpreter of its own.
        daemon.start(warm=False)
        yield daemon
        assert daemon.stop() == 0, daemon.said()
        eventually_nothing(daemon.remains, "nothing is left of the daemon")
    finally:
        daemon.close()


@pytest.fixture
def lend(request: pytest.FixtureRequest) -> Callable[[Daemon], AbstractContextManager[Daemon]]:
    """Lends a shared daemon to a test; the daemon has no device before and after the test."""

    @contextmanager
    def lent(daemon: Daemon) -> Iterator[Daemon]:
        request.node.stash[_DAEMON] = daemon
        request.node.stash[_LOG_START] = len(daemon.said().encode())
        yield daemon
        try:
            eventually_nothing(daemon.leftovers, "the test leaves nothing")
            daemon.reap()
        except (AssertionError, DaemonError, subprocess.TimeoutExpired) as left:
            daemon.clean()
            pytest.fail(f"left behind: {left}")

    return lent


@pytest.fixture
def daemon(
    session_daemon: Daemon, lend: Callable[[Daemon], AbstractContextManager[Daemon]]
) -> Iterator[Daemon]:
    """The session's daemon."""
    with lend(session_daemon):
        yield session_daemon


@pytest.fixture(autouse=True)
def healthy_machine() -> Iterator[None]:
    """Fail a test that leaves a task in an unkillable wait or that makes the kernel log a warning."""
    log = KernelLog()
    yield
    try:
        assert log.complaints() == []
        expect_no_stuck_task()
    finally:
        log.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show a failure with the output of the daemon and the backends during the test."""
    report = yield
    daemon = item.stash.get(_DAEMON, None)
    if daemon is not None and report.failed:
        said = daemon.said(item.stash[_LOG_START])
        report.sections.append(("the daemon said", said))
        for backend in daemon.backends:
            report.sections.append((f"backend {backend.pid} said", backend.said()))
    return report
