"""For tests of your own backend: `check_backend` judges its promises as `ublkpool backend check` does.

With pytest, in conftest.py and in a test:

    from ublkpool.testing import check_backend

    def test_my_backend(check_backend, tmp_path):
        check_backend("mybackend.py", {"path": tmp_path / "disk.img", "size": "16M"}, seconds=10)

Each broken promise fails the test with the report, which names the seed.  Needs no kernel, root or daemon; the store is
overwritten.
"""

import secrets
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from ublkpool.daemon.check.check import CheckOptions as CheckOptions
from ublkpool.daemon.check.check import Report as Report
from ublkpool.daemon.check.check import run_check
from ublkpool.daemon.check.host import NotStarted as NotStarted
from ublkpool.daemon.check.promises import PROMISES as PROMISES

try:
    import pytest
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("ublkpool.testing needs pytest: pip install pytest") from error


def report_on(kind: str, options: Mapping[str, object] | None = None, **asked: Any) -> Report:
    """Check a KIND or FILE.py with its options; `asked` are fields of `CheckOptions`, with a new `seed` by default.

    Raises `NotStarted` if the backend cannot start at all.
    """
    texts: dict[str, str | list[str]] = {}
    for name, value in (options or {}).items():
        texts[name] = [*map(str, value)] if isinstance(value, list | tuple) else str(value)
    return run_check(
        kind, texts, msgspec.convert({"seed": secrets.randbelow(1 << 32), **asked}, CheckOptions)
    )


@pytest.fixture
def check_backend() -> Callable[..., Report]:
    """A function with the parameters of `report_on`, which fails the test if a promise is broken."""

    def check(kind: str, options: Mapping[str, object] | None = None, **asked: Any) -> Report:
        __tracebackhide__ = True
        report = report_on(kind, options, **asked)
        if not report.is_kept:
            pytest.fail("\n".join(report.lines()), pytrace=False)
        return report

    return check
