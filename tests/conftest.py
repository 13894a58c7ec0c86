"""Selects the tests that this machine can run, and the checked build of the queue core."""

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.guest.one_kernel import runs_here
from support.guest.passed import Passed

# Before a test imports the core: the checked build asserts the core's invariants after each call (csrc/queue_check.h).
sys.modules["ublkpool.ublk._native"] = importlib.import_module("ublkpool.ublk._native_checked")

VM_TESTS = Path(__file__).parent / "vm"
CONTROL_DEVICE = "/dev/ublk-control"
KERNEL_LOG = Path("/dev/kmsg")
_MAY_WAIT: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    """From here on, record each call that a disk can block and that an asyncio loop makes in this process."""
    if (passed := Passed.of_this_guest()) is not None:
        config.pluginmanager.register(passed)
    # Not before the checked core has its name.
    from support.fakes.quiet_fork import fork_when_quiet
    from support.fakes.watched_calls import is_on_a_disk, watch

    watch(lambda path: not is_on_a_disk(path), _MAY_WAIT.append)
    if "UBLKPOOL_SANITIZED" in os.environ:
        os.fork = fork_when_quiet


@pytest.fixture(autouse=True)
def no_call_on_a_loop_may_wait_for_a_disk() -> Iterator[None]:
    """Fail a test if its asyncio loop made a call that a disk can block."""
    _MAY_WAIT.clear()
    yield
    assert _MAY_WAIT == []


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect vm tests without the driver, and in a guest the tests that another guest of this run covers.

    They are deselected rather than skipped, because a skip reads as a problem.
    """
    for item in items:
        if VM_TESTS in item.path.parents:
            item.add_marker("vm")
    if not os.access(CONTROL_DEVICE, os.R_OK | os.W_OK):
        _deselect([item for item in items if item.get_closest_marker("vm")], config, items)
    else:
        _deselect([item for item in items if not _runs_here(item)], config, items)
    if "UBLKPOOL_LONG" not in os.environ:
        _deselect([item for item in items if item.get_closest_marker("long")], config, items)


def _runs_here(item: pytest.Item) -> bool:
    marker = item.get_closest_marker("one_kernel")
    return marker is None or runs_here(marker.args[0])


def _deselect(left_out: list[pytest.Item], config: pytest.Config, items: list[pytest.Item]) -> None:
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_runtest_logstart(nodeid: str) -> None:
    """Name the test in the guest's kernel log, the only log that remains of a guest that dies."""
    if "UBLKPOOL_GUEST" in os.environ:
        KERNEL_LOG.write_text(f"test: {nodeid}\n")
