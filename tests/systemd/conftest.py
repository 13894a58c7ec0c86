"""Two boots of the systemd guest for each kernel in UBLKPOOL_KERNELS; without the variable no test is collected."""

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from support.guest.cache import GuestCache
from support.guest.one_kernel import guest_for
from support.systemd.boot_reports import pytest_runtest_makereport
from support.systemd.boots import Seen, run_boot
from support.systemd.facts import POWEROFF
from support.systemd.guest import OFF
from support.systemd.root import SystemdRoot
from support.systemd.scene import CHECKS, prepare

__all__ = ["pytest_runtest_makereport"]

KERNELS = os.environ.get("UBLKPOOL_KERNELS", "").split()
ALL_KERNELS = os.environ.get("UBLKPOOL_ALL_KERNELS", "").split() or KERNELS
"""The kernels of this `make test-systemd`, which runs this folder once for each."""
HERE = Path(__file__).parent
FURTHER = {"confinement": "7.3", "no_network": "7.3", "names": "7.3", "stacks": "6.12"}
"""The steps of the first boot that do not depend on the kernel, each with the one under which it runs."""
LONG = {"user_session": "7.3", "user_comes_back": "7.3"}
"""Those that run with UBLKPOOL_LONG only, the second in the second boot."""
_measured: list[str] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`make test-systemd` sets the variable; a plain pytest boots nothing."""
    ours = [item for item in items if HERE in item.path.parents]
    gone = ours if not KERNELS else [item for item in ours if not is_wanted(item)]
    if gone:
        config.hook.pytest_deselected(items=gone)
        items[:] = [item for item in items if item not in gone]


def is_wanted(item: pytest.Item) -> bool:
    """Whether the test runs with the kernel that it is for: a test with `one_kernel` in one guest only."""
    marker, call = item.get_closest_marker("one_kernel"), getattr(item, "callspec", None)
    return marker is None or call is None or runs_here(call.params["kernel"], marker.args[0])


@pytest.fixture(scope="session", params=KERNELS or ["none"])
def kernel(request: pytest.FixtureRequest) -> str:
    """The series of the guest's kernel."""
    return str(request.param)


@pytest.fixture(scope="session")
def root(kernel: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A root with the checkout installed and the scene set, thrown away at the end."""
    path = tmp_path_factory.mktemp("systemd") / "root"
    made = SystemdRoot(GuestCache())
    made.fetch()
    made.copy(path)
    prepare(path)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def first(root: Path, kernel: str) -> Seen:
    """The first boot: restarts, deaths, and a poweroff with dirty data; in one guest also FURTHER."""
    return measured(run_boot(root, kernel, CHECKS, "first", *further(kernel)), f"Linux {kernel}, first boot")


def further(kernel: str) -> list[str]:
    """The steps that run in the guest of this kernel only."""
    named = FURTHER | (LONG if "UBLKPOOL_LONG" in os.environ else {})
    return [step for step, one in named.items() if runs_here(kernel, one)]


def runs_here(kernel: str, named: str) -> bool:
    """Whether the guest of this kernel runs what does not depend on the kernel, and names that one."""
    return guest_for(named, ALL_KERNELS) == kernel


@pytest.fixture(scope="session")
def second(root: Path, kernel: str, first: Seen) -> Seen:
    """The next boot, and a poweroff after a backend has ended."""
    return measured(
        run_boot(root, kernel, CHECKS, "second", *further(kernel)), f"Linux {kernel}, second boot"
    )


def measured(seen: Seen, title: str) -> Seen:
    """Record for the summary how long the poweroff took and how slow the guest was."""
    with suppress(LookupError):
        took_s = seen.boot.second_of(OFF) - seen.boot.second_of(POWEROFF)
        command_s = seen.fact("seconds of a command")
        _measured.append(f"{title}: off {took_s:.1f} s after poweroff; a command of ours takes {command_s} s")
    return seen


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the measurements."""
    for line in _measured:
        terminalreporter.write_line(line)
