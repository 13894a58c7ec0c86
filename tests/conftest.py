"""Which tests can run here, with which build of the queue core, and which one the log of a guest is about."""

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before a test imports the core: the checked build asserts the core's invariants after each call (csrc/queue_check.h).
sys.modules["ublkpool.ublk._native"] = importlib.import_module("ublkpool.ublk._native_checked")

VM_TESTS = Path(__file__).parent / "vm"
CONTROL_DEVICE = "/dev/ublk-control"
NEWEST_GUEST = "7.3"
KERNEL_LOG = Path("/dev/kmsg")
_MAY_WAIT: list[str] = []


def pytest_configure() -> None:
    """From here on, in this process: calls that a disk may keep waiting are noted if an asyncio loop makes them."""
    # Not before the checked core has its name.
    from support.fakes.watched_calls import is_on_a_disk, watch

    watch(lambda path: not is_on_a_disk(path), _MAY_WAIT.append)


@pytest.fixture(autouse=True)
def no_call_on_a_loop_may_wait_for_a_disk() -> Iterator[None]:
    """A test fails whose loop made such a call."""
    _MAY_WAIT.clear()
    yield
    assert _MAY_WAIT == []


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave tests that need the driver to a machine with one; a skip would read as something amiss."""
    for item in items:
        if VM_TESTS in item.path.parents:
            item.add_marker("vm")
    if not os.access(CONTROL_DEVICE, os.R_OK | os.W_OK):
        _leave_out("vm", config, items)
    elif os.environ.get("UBLKPOOL_GUEST", NEWEST_GUEST) != NEWEST_GUEST:
        _leave_out("one_kernel", config, items)


def _leave_out(marker: str, config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if item.get_closest_marker(marker)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_runtest_logstart(nodeid: str) -> None:
    """A guest that dies leaves only its kernel's log behind."""
    if "UBLKPOOL_GUEST" in os.environ:
        KERNEL_LOG.write_text(f"test: {nodeid}\n")
