"""Shows the log of a boot whose test has failed."""

from support.systemd.boot_reports import pytest_runtest_makereport

__all__ = ["pytest_runtest_makereport"]
