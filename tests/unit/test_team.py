"""What is said of a team of workers, which end for one another's sake."""

import asyncio
from types import SimpleNamespace
from typing import cast

from ublkpool.daemon.team import Plan, Team
from ublkpool.daemon.worker_process import WorkerProcess

QUEUES = 16
KILLED = 137


def _worker(queue: int, status: int) -> WorkerProcess:
    async def wait() -> int:
        return status

    return cast(WorkerProcess, SimpleNamespace(queue=queue, child=SimpleNamespace(wait=wait)))


async def _first_ended(killed: int) -> int:
    """Whose end is told, when all end at once and one of them was killed."""
    team = Team(cast(Plan, None), 1, lambda *_: None)
    team.workers = [_worker(queue, KILLED if queue == killed else 0) for queue in range(QUEUES)]
    return (await team.ended()).queue


def test_a_device_dies_of_the_worker_that_was_killed_and_not_of_those_that_were_left_nothing() -> None:
    for killed in range(QUEUES):
        assert asyncio.run(_first_ended(killed)) == killed
