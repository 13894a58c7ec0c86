"""Threads, coroutines and exclusive chunks keep every promise, over both transports, kills included."""

from collections.abc import Callable
from pathlib import Path

import pytest

from support.fakes.rest_store import RestStore, served
from ublkpool.testing import Report, report_on

EXAMPLE = Path(__file__).parents[2] / "examples/rest_blocks.py"
DISK_BYTES = 4 << 20

CHUNKED = """
import asyncio, os, time
CHUNK = 65536
parallel, exclusive_bytes = 8, CHUNK
def open(path: str):
    global file
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
def get_size(): return os.fstat(file).st_size
def identity(): return "chunks"
def flush(): os.fdatasync(file)

def pieces(buf, offset):
    while buf:
        start = offset % CHUNK
        yield offset - start, start, buf[: CHUNK - start]
        buf, offset = buf[CHUNK - start :], offset + CHUNK - start
"""
PLAIN = """
def pread(buf, offset):
    for at, start, part in pieces(buf, offset):
        part[:] = os.pread(file, CHUNK, at)[start : start + len(part)]

def pwrite(buf, offset):
    for at, start, part in pieces(buf, offset):
        chunk = bytearray(os.pread(file, CHUNK, at))
        time.sleep(0)
        chunk[start : start + len(part)] = part
        os.pwrite(file, chunk, at)
"""
ASYNC = """
async def pread(buf, offset):
    for at, start, part in pieces(buf, offset):
        await asyncio.sleep(0)
        part[:] = os.pread(file, CHUNK, at)[start : start + len(part)]

async def pwrite(buf, offset):
    for at, start, part in pieces(buf, offset):
        chunk = bytearray(os.pread(file, CHUNK, at))
        await asyncio.sleep(0.001)
        chunk[start : start + len(part)] = part
        os.pwrite(file, chunk, at)
"""


def _plugin(directory: Path, code: str) -> tuple[str, dict[str, str]]:
    (directory / "mine.py").write_text(CHUNKED + code)
    (directory / "disk.img").write_bytes(bytes(DISK_BYTES))
    return str(directory / "mine.py"), {"path": str(directory / "disk.img")}


@pytest.mark.parametrize("code", [PLAIN, ASYNC], ids=["threads", "coroutines"])
def test_chunks_are_changed_without_a_lock(
    tmp_path: Path, check_backend: Callable[..., Report], code: str
) -> None:
    kind, options = _plugin(tmp_path, code)
    report = check_backend(kind, options, seconds=0, deadline_s=60)
    assert report.counts["kill"] >= 2 and report.counts["fence"] >= 1


@pytest.mark.parametrize("code", [PLAIN, ASYNC], ids=["threads", "coroutines"])
def test_without_exclusive_bytes_the_same_code_loses_writes(tmp_path: Path, code: str) -> None:
    kind, options = _plugin(tmp_path, code + "exclusive_bytes = 0\n")
    report = report_on(kind, options, seconds=20, deadline_s=60)
    assert not report.is_kept


def test_the_rest_example_keeps_every_promise(tmp_path: Path, check_backend: Callable[..., Report]) -> None:
    with served(RestStore()) as store:
        options = {"host": store.address, "path": "/disk", "size": str(DISK_BYTES)}
        report = check_backend(str(EXAMPLE), options, seconds=0, deadline_s=60)
        assert report.counts["kill"] >= 2 and store.highest >= 3
