"""Lines of the kernel log about ublk and hung tasks, for the error of a command that does not return."""

import os
import re
from collections.abc import Iterable, Iterator

LINES_MAX = 4
_DEVICE = "/dev/kmsg"
_RECORD_BYTES_MAX = 8192
_RELEVANT = re.compile(r"ublk|blocked for more than|hung_task|\bBUG: |\bWARNING: |\bOops\b")


def last_words(path: str = _DEVICE) -> list[str]:
    """The last relevant lines, `[seconds since boot] text`, oldest first; empty if the log cannot be read."""
    try:
        kmsg = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        return relevant(_records(kmsg))
    finally:
        os.close(kmsg)


def relevant(records: Iterable[bytes]) -> list[str]:
    """The last `LINES_MAX` relevant ones of these /dev/kmsg records (`priority,number,microseconds,flags;text`)."""
    found = [line for line in map(_line, records) if _RELEVANT.search(line)]
    return found[-LINES_MAX:]


def _line(record: bytes) -> str:
    head, _, text = record.decode(errors="replace").partition(";")
    time_us = [*head.split(","), "", "", ""][2]
    seconds = int(time_us) / 1e6 if time_us.isdigit() else 0.0
    # Further lines are a dictionary that names the device.
    return f"[{seconds:.3f}] {text.partition(chr(10))[0]}"


def _records(kmsg: int) -> Iterator[bytes]:
    while True:
        try:
            record = os.read(kmsg, _RECORD_BYTES_MAX)
        except BlockingIOError:
            return
        except BrokenPipeError:
            # Records were overwritten meanwhile: the next read returns the oldest one left.
            continue
        if not record:
            return
        yield record
