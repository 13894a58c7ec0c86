"""A hanging control command ends, and its error has its kernel stack and the last lines of the kernel log."""

import asyncio
import time
from pathlib import Path

import pytest

from ublkpool.daemon.kernel import kernel_log
from ublkpool.daemon.kernel.control_process import ControlFailed, ControlRunner

RECORDS = [
    b"6,1,1000000,-;ublk: loaded\n",
    b"6,2,2000000,-;something else\n",
    b"3,3,130500000,-;INFO: task ublkpool-ctl:77 blocked for more than 120 seconds.\n SUBSYSTEM=x\n",
    b"\xff broken",
]


def hang() -> None:
    time.sleep(600)


def test_a_hang_is_reported_with_what_the_kernel_log_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_log, "last_words", lambda: kernel_log.relevant(RECORDS))
    with pytest.raises(ControlFailed) as caught:
        asyncio.run(ControlRunner().run("vol0: STOP_DEV", hang, type(None), 0.2))
    error = str(caught.value)
    assert error.startswith("vol0: STOP_DEV has hung for 0 s") and "\n" not in error
    assert error.endswith(
        "the kernel log says: [1.000] ublk: loaded | "
        "[130.500] INFO: task ublkpool-ctl:77 blocked for more than 120 seconds."
    )
    assert caught.value.errno == 0


def test_only_the_last_few_lines_are_reported() -> None:
    many = [b"6,%d,%d,-;ublk %d\n" % (n, n * 1000000, n) for n in range(20)]
    assert kernel_log.relevant(many) == [f"[{n}.000] ublk {n}" for n in range(16, 20)]


def test_a_hang_is_reported_without_a_readable_kernel_log(tmp_path: Path) -> None:
    assert kernel_log.last_words(str(tmp_path / "none")) == []
    (tmp_path / "kmsg").write_bytes(RECORDS[0])
    assert kernel_log.last_words(str(tmp_path / "kmsg")) == ["[1.000] ublk: loaded"]
