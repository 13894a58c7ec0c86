"""Brokers, workers and a device's pool for the tests of this folder."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from support.fakes.broker_rig import (
    DEVICE,
    GEOMETRY,
    INSTANCE,
    QUEUES,
    RESERVE,
    BrokerProcess,
    Start,
    Worker,
    introduce,
)
from ublkpool.bufpool.pool.arena import Arena, arena_prefix, list_orphans, unlink_arena


@pytest.fixture
def arena() -> Iterator[Arena]:
    prefix = arena_prefix(INSTANCE, DEVICE)
    with Arena.create(prefix, GEOMETRY, QUEUES, DEVICE, RESERVE) as arena:
        yield arena
        arena.unlink()
    assert list_orphans(INSTANCE) == []


@pytest.fixture
def endpoint(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/broker"


@pytest.fixture
def start(endpoint: str) -> Iterator[Callable[..., BrokerProcess]]:
    started: list[BrokerProcess] = []

    def start_one(exit_on_eof: bool = True) -> BrokerProcess:
        started.append(BrokerProcess(endpoint, exit_on_eof))
        return started[-1]

    yield start_one
    for each in started:
        each.kill()


@pytest.fixture
def worker(endpoint: str) -> Iterator[Callable[[int, int], Worker]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    workers: list[Worker] = []

    def connect(queue: int, epoch: int) -> Worker:
        workers.append(Worker(context, endpoint, queue, epoch))
        return workers[-1]

    yield connect
    for each in workers:
        each.socket.close()
    context.term()


@pytest.fixture
def broker(start: Start, arena: Arena) -> BrokerProcess:
    """A broker that serves the device and expects its two workers in epoch 1."""
    broker = start()
    introduce(broker, arena)
    return broker


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left_in_shared_memory() -> Iterator[None]:
    yield
    left = list_orphans(INSTANCE)
    for prefix in left:
        unlink_arena(prefix)
    assert left == []
