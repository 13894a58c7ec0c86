"""The kernel copies a write once, to the address that the backend named."""

import os
import zlib
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from support.vm.daemon import DEADLINE_S, Daemon, total
from support.vm.process import read_block, write_block
from support.vm.recorder import Landed, start_recorder

MIB = 1 << 20
SIZES = (512, 4096, 12288, 65536, 512 * 1024)


def _heard(listening: "Connection[None, Landed]") -> Landed:
    """The recorder's next report."""
    assert listening.poll(DEADLINE_S), "the recorder says nothing"
    return listening.recv()


def test_the_kernel_copies_each_write_to_the_address_that_the_backend_named(daemon: Daemon) -> None:
    listening, reporting = Pipe(duplex=False)
    daemon.add("copies", size_bytes=8 * MIB, placement="backend")
    recorder = start_recorder(daemon.run_dir, "copies", 8 * MIB, reporting)
    status = daemon.wait_live("copies")
    assert status.path is not None
    for index, length in enumerate(SIZES):
        data, offset = os.urandom(length), index * MIB
        assert write_block(status.path, offset, data) == 0
        landed = _heard(listening)
        assert (landed.offset, landed.length, landed.checksum) == (offset, length, zlib.crc32(data))
        assert landed.shown_address == landed.named_address
        assert landed.empty_before
        assert read_block(status.path, offset, length) == data
    stats = daemon.rest("copies")
    assert total(stats, "kernel_write_bytes") == sum(SIZES)
    assert sum(queue.requests.write for queue in stats.queues) == len(SIZES)
    assert total(stats, "own_copy_bytes") == 0
    daemon.delete("copies")
    assert recorder.wait() == 0


def test_a_write_with_fua_says_so_to_its_backend(daemon: Daemon) -> None:
    listening, reporting = Pipe(duplex=False)
    daemon.add("fua", size_bytes=MIB, placement="backend")
    recorder = start_recorder(daemon.run_dir, "fua", MIB, reporting)
    status = daemon.wait_live("fua")
    assert status.path is not None
    said = []
    for flags in (0, os.RWF_DSYNC, 0):
        assert write_block(status.path, 0, bytes(4096), flags) == 0
        said.append(_heard(listening).fua)
    assert said == [False, True, False]
    daemon.delete("fua")
    assert recorder.wait() == 0
