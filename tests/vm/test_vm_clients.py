"""Clients whose buffers the backend shares: nothing is copied where the driver can tell, everything elsewhere."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.vm_daemon import Daemon, eventually, total
from support.vm_fio import finish_fio, start_fio
from support.vm_process import Forked
from support.vm_recovery import kill, wait_for_backend, wait_for_epoch
from ublkpool.bufpool.client_buffers import ClientBuffer
from ublkpool.ublk import control
from ublkpool.ublk.abi import Feature

MIB = 1 << 20
SLICES = 8
AREA_BYTES = SLICES * 4 * MIB


def is_offered() -> bool:
    return bool(control.get_features() & Feature.SHMEM_ZC)


def copied(daemon: Daemon, name: str) -> int:
    stats = daemon.stats(name)
    return total(stats, "kernel_write_bytes") + total(stats, "kernel_read_bytes")


def in_place(daemon: Daemon, name: str) -> int:
    return total(daemon.stats(name), "zero_copy_bytes")


class Disk:
    """Direct I/O through a client's buffer."""

    def __init__(self, buffer: ClientBuffer) -> None:
        self.buffer = buffer
        self.fd = os.open(buffer.path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)

    def write(self, offset: int, data: bytes, at: int = 0) -> None:
        self.buffer.view[at : at + len(data)] = data
        with self.buffer.view[at : at + len(data)] as part:
            assert os.pwritev(self.fd, [part], offset) == len(data)

    def read(self, offset: int, length: int, at: int = 0) -> bytes:
        with self.buffer.view[at : at + length] as part:
            part[:] = bytes(length)
            assert os.preadv(self.fd, [part], offset) == length
            return bytes(part)

    def close(self) -> None:
        os.close(self.fd)
        self.buffer.close()


@pytest.mark.parametrize(
    ("backend", "config"),
    [
        ("memory", {}),
        ("memory", {"placement": "backend", "queues": 2}),
        ("memory", {"need_get_data": False, "depth": 32}),
    ],
    ids=["pool", "backend", "off"],
)
def test_what_a_client_writes_from_a_shared_buffer_comes_back_and_nothing_is_copied(
    daemon: Daemon, backend: str, config: dict[str, object]
) -> None:
    name = f"clients-{config.get('placement', 'pool')}-{config.get('depth', 128)}"
    options = {"size": "32M", "placement": config.get("placement", "pool")}
    with daemon.device(name, backend, options=options, client_buffers_bytes=AREA_BYTES, **config) as status:
        assert ("SHMEM_ZC" in status.flags) == is_offered()
        before = copied(daemon, name)
        disk = Disk(ClientBuffer.open(name, MIB, run_dir=daemon.run_dir))
        assert disk.buffer.is_shared == is_offered()
        moved = 0
        for index, length in enumerate((512, 4096, 12288, 65536, 512 * 1024)):
            data = os.urandom(length)
            disk.write(index * MIB, data, at=index * 4096)
            assert disk.read(index * MIB, length, at=64 * 1024) == data
            moved += 2 * length
        counted = (in_place(daemon, name), copied(daemon, name) - before)
        assert counted == ((moved, 0) if is_offered() else (0, moved))
        disk.close()
