"""The tests that have passed in a guest that QEMU then stalled: the guest after it does not run them again.

The runner (`__main__.py`) names a file that all guests of one command share; the pytest plugin adds to it.  A test that
failed in such a guest may have failed for its lost timers, and is run again.
"""

import os
from pathlib import Path

import pytest

VARIABLE = "UBLKPOOL_PASSED"
"""Its value is the file's path."""


class Passed:
    """The plugin of one pytest run."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._before = frozenset(file.read_text().splitlines() if file.exists() else ())
        self._failed: set[str] = set()

    @classmethod
    def of_this_guest(cls) -> "Passed | None":
        """None outside the runner's guests."""
        named = os.environ.get(VARIABLE)
        return cls(Path(named)) if named else None

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leave out what has passed."""
        passed = [item for item in items if item.nodeid in self._before]
        items[:] = [item for item in items if item.nodeid not in self._before]
        config.hook.pytest_deselected(items=passed)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """A guest that has nothing left to run is no failure."""
        if self._before and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
            session.exitstatus = pytest.ExitCode.OK

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a test whose set-up, call and teardown went well."""
        if report.failed:
            self._failed.add(report.nodeid)
        elif report.when == "teardown" and report.nodeid not in self._failed:
            with self._file.open("a") as file:
                file.write(f"{report.nodeid}\n")
