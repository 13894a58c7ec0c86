"""One daemon for all tests of a session, and after every test the search for what it left behind."""

import subprocess
from collections.abc import Iterator

import pytest

from support.vm_daemon import Daemon, eventually_nothing
from support.vm_health import KernelLog, expect_nobody_stuck

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
def daemon(session_daemon: Daemon, request: pytest.FixtureRequest) -> Iterator[Daemon]:
    """The session's daemon, which has no device before and after the test."""
    request.node.stash[_DAEMON] = session_daemon
    request.node.stash[_LOG_START] = len(session_daemon.said().encode())
    yield session_daemon
    try:
        eventually_nothing(session_daemon.leftovers, "the test leaves nothing")
        session_daemon.reap()
    except (AssertionError, subprocess.TimeoutExpired) as left:
        session_daemon.clean()
        pytest.fail(f"left behind: {left}")


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
