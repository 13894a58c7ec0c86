"""A log whose reader has stopped: no line of it waits, and the lines that are lost are counted."""

import logging
import os
import socket
import time
from contextlib import suppress

import pytest

from ublkpool.daemon import logs

_log = logging.getLogger("ublkpool.test")


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_a_log_that_nothing_reads_stops_nothing(kind: str) -> None:
    if kind == "pipe":
        reader, writer = os.pipe()
    else:
        reader, writer = (each.detach() for each in socket.socketpair())
    kept = [(name, logging.getLogger(name)) for name in logs._LOGGERS]
    before = [(each, each.handlers[:], each.propagate, each.level) for _, each in kept]
    try:
        with os.fdopen(writer, "w") as stream:
            logs.configure("info", "logfmt", stream)
            began_s = time.monotonic()
            for number in range(5000):
                _log.warning("line %d %s", number, "x" * 100)
            assert time.monotonic() - began_s < 60
            os.set_blocking(reader, False)
            told = _drained(reader)
            _log.warning("again")
            told += _drained(reader)
            lines = told.decode().splitlines()
            assert "lines of this log were lost" in lines[-2] and "again" in lines[-1]
            whole = [line for line in lines if "line " in line]
            assert all(line.endswith('x"') for line in whole)
            lost = int(lines[-2].split('message="')[1].split()[0])
            assert len(whole) + lost == 5000
    finally:
        for each, handlers, propagate, level in before:
            each.handlers[:], each.propagate = handlers, propagate
            each.setLevel(level)
        os.close(reader)


def _drained(reader: int) -> bytes:
    told = b""
    with suppress(BlockingIOError):
        while text := os.read(reader, 65536):
            told += text
    return told
