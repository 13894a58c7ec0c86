"""The length of requests that a store prefers, as the kernel and mkfs see it."""

import os
from pathlib import Path

import pytest

from support.vm.daemon import Daemon
from support.vm.files import run
from support.vm.process import run_command
from support.vm.recovery import kill, wait_for_backend

pytestmark = [pytest.mark.one_kernel("7.3"), pytest.mark.long]
MIB = 1 << 20
BACKEND = """
import os
from pathlib import Path

from ublkpool.bufpool.sdk.backend import Backend, Hint, Properties

HERE = Path(__file__).parent


class Prefers(Backend):
    def open(self, hint):
        self.file = os.open(HERE / "prefers.img", os.O_RDWR | os.O_CLOEXEC)
        length = int((HERE / "length").read_text())
        return Properties(size_bytes=os.fstat(self.file).st_size, optimal_io_bytes=length)

    def pread(self, buf, offset):
        os.preadv(self.file, [buf], offset)

    def pwrite(self, buf, offset, fua):
        os.pwrite(self.file, buf, offset)


BACKEND = Prefers
"""


def _queue(path: str, name: str) -> int:
    return int((Path("/sys/block") / Path(path).name / "queue" / name).read_text())


def test_a_disk_has_the_length_that_its_first_backend_prefers_and_keeps_it(daemon: Daemon) -> None:
    plugin, length = daemon.path("prefers.py"), daemon.path("length")
    image = daemon.path("prefers.img")
    plugin.write_text(BACKEND)
    length.write_text(str(4 * MIB))
    image.touch()
    os.truncate(image, 64 * MIB)
    added = run_command(daemon, "add", "vol", "--backend", str(plugin))
    assert (added.status, added.err) == (0, ""), added
    path, before = added.out.strip(), daemon.status("vol").backend.pid
    assert before is not None
    assert _queue(path, "optimal_io_size") == 4 * MIB
    # The kernel reads ahead twice as much.
    assert _queue(path, "read_ahead_kb") == 8 << 10
    run("mkfs.ext4", "-q", path)
    length.write_text("0")
    kill(before)
    wait_for_backend(daemon, "vol", before)
    assert _queue(path, "optimal_io_size") == 4 * MIB
    run("e2fsck", "-fn", path)
    daemon.client.delete(["vol"])
    for each in (plugin, length, image):
        each.unlink()
