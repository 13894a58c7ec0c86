"""Loop devices, which all processes of the machine share: one test process at a time uses them.

Without that, a number that a test has just detached could become another test's device, and a mount namespace that a
test makes would keep another test's file system mounted.
"""

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

_CONTROL = Path("/dev/loop-control")


@contextmanager
def alone_with_loop_devices() -> Iterator[None]:
    """Wait until no other test process is in such a block, and keep others out of theirs."""
    with ExitStack() as stack:
        # Without the node, or the right to open it, no test has a loop device.
        with suppress(OSError):
            fcntl.flock(stack.enter_context(_CONTROL.open()), fcntl.LOCK_EX)
        yield


@contextmanager
def loop_device(image: Path, *options: str) -> Iterator[Path]:
    """A loop device on this file, made with these options of losetup(8); skips the test where none can be made."""
    if os.geteuid() or shutil.which("losetup") is None:
        pytest.skip("needs root and losetup")
    with alone_with_loop_devices():
        try:
            node = Path(_run("losetup", "--find", "--show", *options, str(image)))
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no loop devices here: {error.stderr}")
        try:
            yield node
        finally:
            with suppress(subprocess.CalledProcessError):
                _run("losetup", "--detach", str(node))


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
