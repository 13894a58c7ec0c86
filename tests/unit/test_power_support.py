"""The parts of the power test: the disk with a volatile cache, and the check of the disk found later."""

import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.power.blocks import BLOCK_BYTES, block, broken_promises, parse_promises, sector
from support.vm.volatile_disk import VolatileDisk

SIZE = 1 << 16
READ, WRITE, DISCONNECT, FLUSH, TRIM = 0, 1, 2, 3, 4


class Client:
    """The parts of QEMU's NBD client that the tests need."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(60)
        self.socket.connect(str(path))
        assert self.take(18)[:8] == b"NBDMAGIC"
        self.socket.sendall(struct.pack(">I", 1))
        # An unknown option, then the export.
        self.option(8, b"")
        assert struct.unpack(">QIII", self.take(20))[2] == (1 << 31) + 1
        self.option(7, struct.pack(">IH", 0, 0))
        assert struct.unpack(">HQH", self.take(32)[20:])[1] == SIZE
        self.take(20)

    def option(self, number: int, data: bytes) -> None:
        self.socket.sendall(b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data)

    def take(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            piece = self.socket.recv(length - len(data))
            assert piece
            data += piece
        return data

    def send(
        self, kind: int, cookie: int, offset: int = 0, data: bytes = b"", length: int = 0, fua: bool = False
    ) -> None:
        self.socket.sendall(self.request(kind, cookie, offset, data, length, fua))

    @staticmethod
    def request(
        kind: int, cookie: int, offset: int, data: bytes, length: int = 0, fua: bool = False
    ) -> bytes:
        size = len(data) or length
        return struct.pack(">IHHQQI", 0x25609513, int(fua), kind, cookie, offset, size) + data

    def answer(self) -> tuple[int, int]:
        magic, error, cookie = struct.unpack(">IIQ", self.take(16))
        assert magic == 0x67446698
        return cookie, error

    def write(self, offset: int, text: bytes, fua: bool = False) -> None:
        self.send(WRITE, 1, offset, text, fua=fua)
        assert self.answer() == (1, 0)

    def flush(self) -> None:
        self.send(FLUSH, 2)
        assert self.answer() == (2, 0)

    def close(self) -> None:
        self.send(DISCONNECT, 9)
        self.socket.close()


@pytest.fixture
def disk() -> VolatileDisk:
    return VolatileDisk(bytes(SIZE), seed=1)


@pytest.fixture
def client(disk: VolatileDisk, tmp_path: Path) -> Iterator[Client]:
    with disk.served(tmp_path / "nbd"):
        connected = Client(tmp_path / "nbd")
        yield connected
        connected.close()


def test_a_plain_write_is_readable_and_may_be_lost(disk: VolatileDisk, client: Client) -> None:
    client.write(512, b"a" * 512)
    client.send(READ, 3, 512, length=512)
    assert client.answer() == (3, 0)
    assert client.take(512) == b"a" * 512
    assert disk.after_power_failure(None) == bytes(SIZE)
    assert disk.volatile_count == 1
    found = {disk.after_power_failure(seed)[512:513] for seed in range(20)}
    assert found == {b"a", b"\0"}


def test_a_flush_keeps_what_was_answered_before_it(disk: VolatileDisk, client: Client) -> None:
    client.write(0, b"a" * 512)
    client.flush()
    client.write(512, b"b" * 512)
    assert disk.after_power_failure(None)[:1024] == b"a" * 512 + bytes(512)
    assert disk.volatile_count == 1


def test_a_flush_that_overtakes_a_write_keeps_nothing_of_it(disk: VolatileDisk, client: Client) -> None:
    cookies = range(10, 40)
    requests = [(WRITE, cookie, 512 * cookie, b"c" * 512) for cookie in cookies]
    # In one packet, because an idle disk answers everything.
    client.socket.sendall(b"".join(client.request(*each) for each in [*requests, (FLUSH, 99, 0, b"")]))
    answered_before = []
    while (cookie := client.answer()[0]) != 99:
        answered_before.append(cookie)
    kept = {
        cookie
        for cookie in cookies
        if disk.after_power_failure(None)[512 * cookie : 512 * cookie + 1] == b"c"
    }
    assert kept == set(answered_before)
    assert 0 < len(kept) < len(cookies)
    assert {client.answer()[0] for _ in range(len(cookies) - len(kept))} == set(cookies) - kept


def test_a_fua_write_is_kept_although_an_older_overlapping_one_is_not(
    disk: VolatileDisk, client: Client
) -> None:
    client.write(0, b"a" * 1024)
    client.write(0, b"b" * 512, fua=True)
    for seed in (None, *range(8)):
        found = disk.after_power_failure(seed)
        assert found[:512] == b"b" * 512
        assert found[512:1024] in (b"a" * 512, bytes(512))


def test_what_is_not_offered_is_refused(client: Client) -> None:
    client.send(TRIM, 5, 0, length=512)
    assert client.answer() == (5, 22)


def test_a_disk_without_a_client_ends(disk: VolatileDisk, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with disk.served(tmp_path / "nbd"):
        pass
    assert set(threading.enumerate()) <= before


def test_promises_are_the_newest_of_each_block() -> None:
    said = ["W", "P a 1:1 2:2", "P a 1:3", "P b 7:1", "P", "noise"]
    assert parse_promises(said) == {"a": {1: 3, 2: 2}, "b": {7: 1}}


def content(device: str, *versions: int) -> bytes:
    found = b""
    for number, version in enumerate(versions):
        with block(device, number, version) as memory:
            found += bytes(memory)
    return found


def test_a_newer_version_is_no_broken_promise_and_an_older_one_is() -> None:
    found = content("a", 3, 5)
    assert broken_promises("a", {0: 3, 1: 4}, found) == []
    assert len(broken_promises("a", {0: 4, 1: 6}, found)) == 2


def test_zeros_another_block_another_device_and_a_short_file_are_broken_promises() -> None:
    assert broken_promises("a", {0: 1}, bytes(BLOCK_BYTES))
    assert broken_promises("a", {1: 1}, content("a", 1) * 2)
    assert broken_promises("a", {0: 1}, content("b", 1))
    assert broken_promises("a", {5: 1}, content("a", 1))


def test_each_sector_counts() -> None:
    found = bytearray(content("a", 3))
    found[512:1024] = sector("a", 0, 2)
    assert broken_promises("a", {0: 3}, bytes(found))
    assert broken_promises("a", {0: 2}, bytes(found)) == []
