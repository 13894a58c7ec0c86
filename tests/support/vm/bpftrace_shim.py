"""Replaces `bpftrace trace/seq_io.bt DEV RWBS LENGTH` of a selftest by the kernel's own tracing.

Debian 12's bpftrace does not understand that script, and the guest has no other.  Between its start and SIGTERM the
kernel notes when a request of the device begins (block_io_start) and ends (block_rq_complete); a request that ends
before one that began earlier is printed as the script prints it.  Run by a bare interpreter, as root.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

TRACING = Path("/sys/kernel/tracing")
BEGINS, ENDS = "block_io_start", "block_rq_complete"
BUFFER_KIB = 16384
_EVENT = re.compile(rf"({BEGINS}|{ENDS}): \d+,\d+ (\S+) .*?\) (\d+) \+ \d+")


def out_of_order(lines: Iterable[str], kind: str) -> Iterator[str]:
    """The requests of this kind that ended out of order, in the script's words, which exist for none as well.

    A request whose beginning was not traced is left out.
    """
    begun: dict[str, int] = {}
    count, ended = 0, 0
    for line in lines:
        event = _EVENT.search(line)
        if event is None or not event[2].startswith(kind):
            continue
        if event[1] == BEGINS:
            count += 1
            begun[event[3]] = count
        elif (sequence := begun.pop(event[3], 0)) != 0:
            ended = ended or sequence
            if sequence != ended:
                yield f"out_of_order: sector {event[3]} started at seq {sequence} but completed at seq {ended}"
            ended += 1
    if not ended:
        yield "out_of_order: no request was seen to end"


def main(device: str, kind: str) -> int:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    instance = TRACING / "instances" / f"seq-io-{os.getpid()}"
    instance.mkdir()
    try:
        (instance / "buffer_size_kb").write_text(str(BUFFER_KIB))
        for name in (BEGINS, ENDS):
            (instance / "events/block" / name / "filter").write_text(f"dev == {device}")
            (instance / "events/block" / name / "enable").write_text("1")
        print("BPFTRACE_READY", flush=True)
        signal.sigwait({signal.SIGTERM})
        (instance / "tracing_on").write_text("0")
        lines = (instance / "trace").read_text(errors="replace").splitlines()
        for complaint in out_of_order(lines, kind):
            print(complaint)
    finally:
        for name in (BEGINS, ENDS):
            (instance / "events/block" / name / "enable").write_text("0")
        instance.rmdir()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[2], sys.argv[3]))
