"""A backend that the daemon runs: below a layer, in another environment, and so that the device ends with it."""

import errno
import site
import venv
from pathlib import Path

import pytest

from support.vm.daemon import Daemon, eventually
from support.vm.process import Forked, read_block, run_command, write_block
from support.vm.recovery import kill
from ublkpool.bufpool.sdk.layers.trace import Traced, read_trace

pytestmark = pytest.mark.one_kernel("7.3")
BLOCK, OFFSET = 4096, 65536
ONLY_THERE = "size_bytes = 1 << 20\n"
MORTAL = """
import only_there

survives_death = False
disk = bytearray(only_there.size_bytes)

def get_size():
    return len(disk)

def pread(buf, offset):
    buf[:] = disk[offset : offset + len(buf)]

def pwrite(buf, offset):
    disk[offset : offset + len(buf)] = buf
"""
REASON = "its backend mortal has ended, and the data of the device with it (survives_death = False)"


def _environment(directory: Path) -> Path:
    """A virtual environment that has ublkpool, and a module that no other has; returns its interpreter."""
    venv.EnvBuilder(symlinks=True).create(directory)
    (packages,) = directory.glob("lib/python*/site-packages")
    (packages / "only_there.py").write_text(ONLY_THERE)
    added = [f"import site; site.addsitedir({each!r})" for each in site.getsitepackages()]
    (packages / "ublkpool_of_the_tests.pth").write_text("\n".join(added))
    return directory / "bin" / "python"


def test_a_mortal_backend_of_another_environment_below_a_layer_ends_its_device(daemon: Daemon) -> None:
    trace, plugin = daemon.path("trace"), daemon.path("mortal.py")
    python = _environment(daemon.path("environment"))
    plugin.write_text(MORTAL)
    layer = f"log:file={trace}"
    added = run_command(
        daemon, "add", "vol", "--backend", str(plugin), "--layer", layer, "--", f"python={python}"
    )
    assert (added.status, added.err) == (0, ""), added
    path, pid = added.out.strip(), daemon.status("vol").backend.pid
    assert pid is not None
    assert Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0] == bytes(python)
    assert write_block(path, OFFSET, b"m" * BLOCK) == 0
    assert read_block(path, OFFSET, BLOCK) == b"m" * BLOCK
    assert _traced(trace, "write", OFFSET) == [BLOCK]

    with daemon.stopped(pid):
        write = Forked(lambda: write_block(path, 0, b"n" * BLOCK))
        eventually(lambda: _writes_in_flight(path) == 1, "a write waits for the backend")
        kill(pid)
    assert write.wait() == errno.EIO
    eventually(lambda: daemon.status("vol").state == "failed", "the device has failed")
    assert daemon.status("vol").reason == REASON
    assert REASON in daemon.said()
    daemon.client.delete(["vol"])
    for each in (trace, plugin):
        each.unlink()


def _traced(trace: Path, op: str, offset: int) -> list[int]:
    """The lengths of the requests of this kind at this offset that the layer has noted."""
    requests = [each for each in read_trace(trace) if isinstance(each, Traced)]
    return [each.length for each in requests if (each.op, each.offset) == (op, offset)]


def _writes_in_flight(path: str) -> int:
    """By the kernel's count."""
    return int((Path("/sys/block") / Path(path).name / "inflight").read_text().split()[1])
