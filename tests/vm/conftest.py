"""One daemon for all tests of a session, and after every test the search for what it left behind."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from support.vm.daemon import Daemon, eventually_nothing
from support.vm.health import KernelLog, expect_nobody_stuck
from ublkpool.daemon.errors import DaemonError

_DAEMON: pytest.StashKey[Daemon] = pytest.StashKey()
_LOG_START: pytest.StashKey[int] = pytest.StashKey()


@pytest.fixture(scope="session")
def session_daemon() -> Iterator[Daemon]:
    """Started once; at the end it must go without a trace."""
    daemon = Daemon()
    try:
        daemon.start()
        yield daemon
        assert daemon.stop() == 0, daemon.said()
        eventually_nothing(daemon.remains, "nothing is left of the daemon")
    finally:
        daemon.close()


@pytest.fixture
def lend(request: pytest.FixtureRequest) -> Callable[[Daemon], AbstractContextManager[Daemon]]:
    """Gives a test a daemon that it shares with others, which has no device before and after it."""

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
    """No test may leave a task that nothing ends, or make the kernel complain."""
    log = KernelLog()
    yield
    try:
        assert log.complaints() == []
        expect_nobody_stuck()
    finally:
        log.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """A failure is shown with what the daemon and the backends said meanwhile."""
    report = yield
    daemon = item.stash.get(_DAEMON, None)
    if daemon is not None and report.failed:  # type: ignore[attr-defined]
        said = daemon.said(item.stash[_LOG_START])
        report.sections.append(("the daemon said", said))  # type: ignore[attr-defined]
        for backend in daemon.backends:
            report.sections.append((f"backend {backend.pid} said", backend.said()))  # type: ignore[attr-defined]
    return report
