"""What a failed test shows of the boots that it is about; the `conftest.py` of such tests imports the hook."""

from collections.abc import Generator

import pytest

from support.systemd.boots import Seen

_shown: set[int] = set()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add a boot's log to the first failed test about that boot."""
    report = yield
    for name, value in getattr(item, "funcargs", {}).items():
        if isinstance(value, Seen) and report.failed and id(value) not in _shown:
            _shown.add(id(value))
            report.sections.append((f"the {name} boot", value.report()))
    return report
