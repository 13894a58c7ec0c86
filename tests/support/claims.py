"""Pytest plugin: of the tests that several pytest processes collect, each process runs the files that it claims.

Owns the claims: one empty file for each test file that a process has begun, and one for each that a process has done,
in the directory that `DIRECTORY` names.
`support.spread` starts the processes.  The processes have no second thread, unlike pytest-xdist's: Python from 3.12 on
warns of a fork beside a thread, a warning fails a test, and under AddressSanitizer such a fork may hang (`quiet_fork`).
"""

import hashlib
import itertools
import os
import sys
import time
from pathlib import Path

import pytest

DIRECTORY = "UBLKPOOL_CLAIMS"
_CLOSED = "closed"
_FINISHED = ".finished"


class Claims:
    """Which process runs which test file."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def claim(self, name: str) -> bool:
        """Whether the file is this process's to run: no process has claimed it, and the claims are not closed."""
        if self.is_closed:
            return False
        try:
            self._path(name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def finish(self) -> int:
        """Note that a claimed file has been run; its number among those of all processes, which no other file gets."""
        for number in itertools.count(1):
            try:
                (self._directory / f"{number}{_FINISHED}").touch(exist_ok=False)
                break
            except FileExistsError:
                continue
        return number

    @property
    def is_closed(self) -> bool:
        """Whether no process begins another file."""
        return (self._directory / _CLOSED).exists()

    def close(self) -> None:
        """Let no process begin another file."""
        (self._directory / _CLOSED).touch()

    def _path(self, name: str) -> Path:
        return self._directory / hashlib.sha256(name.encode()).hexdigest()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Run the claimed files, and say on standard error when each is done."""
    if session.testsfailed or session.config.option.collectonly:
        return None
    claims = Claims(Path(os.environ[DIRECTORY]))
    files = [(name, list(items)) for name, items in itertools.groupby(session.items, _file_of)]
    try:
        for name, items in files:
            if claims.claim(name):
                before, begun_s = session.testsfailed, time.monotonic()
                _run(session, items)
                failed = f"{session.testsfailed - before} FAILED of " if session.testsfailed > before else ""
                count = f"[{claims.finish()}/{len(files)}]"
                took = f"{time.monotonic() - begun_s:6.1f} s"
                print(f"{count:>9} {took}  {name}: {failed}{len(items)}", file=sys.stderr, flush=True)
    except (session.Failed, session.Interrupted):
        claims.close()
        raise
    return True


def _file_of(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0]


def _run(session: pytest.Session, items: list[pytest.Item]) -> None:
    """As pytest's own loop does; fixtures of every scope end with the file."""
    for item, following in itertools.zip_longest(items, items[1:]):
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)
