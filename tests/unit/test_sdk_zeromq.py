"""Behaviour of the SDK's links that only ZeroMQ has."""

from pathlib import Path
from typing import Any

import pytest
import zmq

from support.fakes.plain_backend import Plain
from support.fakes.worker import BackendThread, FakeWorker, serving
from ublkpool.bufpool.errors import WireError
from ublkpool.bufpool.sdk.zeromq_links import ZeroMQLinks
from ublkpool.bufpool.wire import Descriptor, Kind


def test_a_first_connection_that_stands_at_once_is_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    watch, connect = ZeroMQLinks._watch_connection, zmq.Socket.connect

    def watching(self: ZeroMQLinks, queue: "zmq.Socket[bytes]") -> "zmq.Socket[bytes]":
        steps.append("watch")
        return watch(self, queue)

    def connecting(self: "zmq.Socket[bytes]", address: str) -> Any:
        steps.extend(["connect"] if address.startswith("ipc://") else [])
        return connect(self, address)

    monkeypatch.setattr(ZeroMQLinks, "_watch_connection", watching)
    monkeypatch.setattr(zmq.Socket, "connect", connecting)
    with FakeWorker(tmp_path, size_bytes=1 << 20, queues=2) as worker, serving(worker, Plain()):
        # A link that missed it would take the connection to the next worker for the first: no HELLO, no fence.
        assert steps == ["watch", "watch", "connect", "connect"]


@pytest.mark.parametrize("frame", [b"x" * 63, b"", Descriptor(Kind.PLACED, epoch=1).pack()])
def test_a_worker_that_breaks_the_protocol_ends_the_backend(tmp_path: Path, frame: bytes) -> None:
    with FakeWorker(tmp_path) as worker:
        thread = BackendThread(Plain(), tmp_path)
        worker.accept()
        worker.send_frame(0, frame)
        with pytest.raises(WireError):
            thread.join()
