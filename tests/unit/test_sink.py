"""Memory for what is written and never read: many addresses, little memory."""

import subprocess
import sys

from ublkpool.ublk import _native
from ublkpool.ublk.mappings import SINK_BYTES, map_sink

SIZE_BYTES = 4 << 20
RESIDENT = """
import sys
from ublkpool.ublk.mappings import map_sink

def shared_kib():
    lines = open("/proc/self/status").read().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssShmem"))

def written_kib():
    kib, inside = 0, False
    for line in open("/proc/self/smaps"):
        if "-" in line.split()[0]:
            inside = "ublkpool-sink" in line
        elif inside and line.startswith("Pss:"):
            kib += int(line.split()[1])
    return kib

map_sink(int(sys.argv[1]))
print(written_kib(), shared_kib())
"""


def test_every_address_can_be_written_and_leads_to_the_same_memory() -> None:
    view = _native.ffi.buffer(map_sink(SIZE_BYTES - 4096), SIZE_BYTES - 4096)
    for at in (0, 4096, SINK_BYTES - 1):
        view[at : at + 1] = b"x"
        assert view[at + 7 * SINK_BYTES : at + 7 * SINK_BYTES + 1] == b"x"
    view[len(view) - 1 : len(view)] = b"y"
    assert view[len(view) % SINK_BYTES - 1 : len(view) % SINK_BYTES] == b"y"


def test_it_takes_no_more_memory_than_one_of_its_parts() -> None:
    command = [sys.executable, "-c", RESIDENT, str(SIZE_BYTES)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    proportional_kib, mapped_kib = map(int, ended.stdout.split())
    assert mapped_kib >= SIZE_BYTES >> 10, "every page is mapped before its first use"
    assert proportional_kib <= SINK_BYTES >> 10


def test_a_small_one_has_its_size() -> None:
    assert len(_native.ffi.buffer(map_sink(4096), 4096)) == 4096
