"""Playing a seed in any world: the seeds, the changed fields of a run, the message of a failure.

`UBLKPOOL_SIM_SEEDS=N` plays seeds 0 to N - 1, `UBLKPOOL_SIM_FIRST=K` begins at K.
"""

import os
import random
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import msgspec
import pytest

FIRST = int(os.environ.get("UBLKPOOL_SIM_FIRST", "0"))
CHUNK = 40


class World(Protocol):
    """A world that is played."""

    trace: deque[str]
    """Its last events."""

    def run(self) -> None:
        """Play the scenario to its end.  Raises `AssertionError` for each broken promise."""


S = TypeVar("S", bound=msgspec.Struct)
W = TypeVar("W", bound=World)


def chunks(default: int) -> list[range]:
    """The seeds that a test plays, in chunks; `default` is their number unless the environment sets it."""
    end = FIRST + int(os.environ.get("UBLKPOOL_SIM_SEEDS", default))
    return [range(first, min(first + CHUNK, end)) for first in range(FIRST, end, CHUNK)]


def play(
    seed: int,
    scenario: Callable[[int, random.Random], S],
    world: Callable[[S, random.Random], W],
    **changes: Any,
) -> W:
    """One run of the scenario that the seed decides, with these fields changed; a failure names its seed."""
    rng = random.Random(seed)
    played = msgspec.structs.replace(scenario(seed, rng), **changes)
    made = world(played, rng)
    try:
        made.run()
    except Exception as error:
        trace = "\n  ".join(made.trace)
        pytest.fail(
            f"seed {seed}: {error!r}\n{played}\n  {trace}\n"
            f"replay: UBLKPOOL_SIM_FIRST={seed} UBLKPOOL_SIM_SEEDS=1"
        )
    return made
