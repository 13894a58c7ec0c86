"""Seeded runs of a device that grows while its processes are killed; see `support/sim/resize_world.py`."""

import random
import re
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest

from support.sim import play as sim_play
from support.sim.processes import DeviceScenario, Victim
from support.sim.resize_world import ResizeWorld
from ublkpool.daemon.device import adoption, device, resize
from ublkpool.daemon.device.binding import Binding

SEEDS = 48
KILLS: tuple[tuple[Victim, ...], ...] = (
    ("supervisor",),
    ("backend",),
    ("supervisor", "backend"),
    ("supervisor", "backend", "worker", "broker"),
)
CORNERS = (
    "supervisor killed in a resize",
    "backend killed in a resize",
    "worker killed in a resize",
    "resizes refused",
    "disk told after a resize's end",
)


def scenario(seed: int, rng: random.Random) -> DeviceScenario:
    """Seeds walk through the victims; the rest is drawn."""
    victims = KILLS[seed % len(KILLS)]
    return DeviceScenario(
        model="7.3",
        queues=rng.choice((1, 2)),
        depth=rng.randint(1, 3),
        block_bytes=rng.choice((512, 4096)),
        need_get_data=True,
        place_in_backend=False,
        reads_own=False,
        lies=False,
        rings=seed // len(KILLS) % 2 == 1,
        slow_state=True,
        steps=rng.choice((300, 600)),
        kills=tuple(rng.choice(victims) for _ in range(rng.randint(2, 5))),
    )


_counts: dict[int, Counter[str]] = {}


def play(seed: int, **changes: Any) -> ResizeWorld:
    world = sim_play.play(seed, scenario, ResizeWorld, **changes)
    _counts[seed] = world.counts
    return world


@pytest.mark.parametrize("seeds", sim_play.chunks(SEEDS), ids=repr)
def test_after_any_deaths_there_is_one_size_and_the_store_has_it(seeds: range) -> None:
    for seed in seeds:
        play(seed)


def test_the_runs_reach_every_corner() -> None:
    reached = Counter[str]()
    for seed in range(SEEDS):
        reached.update(_counts.get(seed) or play(seed).counts)
        if all(reached[corner] >= 2 for corner in CORNERS) and reached["resizes"] >= 20:
            return
    raise AssertionError(reached)


def test_a_driver_without_update_size_leaves_every_size_as_it_is() -> None:
    for seed in range(4):
        world = play(seed, model="6.12")
        assert not world.counts["resizes"] and world.counts["resizes refused"]
        assert world.kernel.size_bytes == world._reach_bytes == world.first_sectors * 512


async def _no_store(*_: Any) -> None:
    """The driver is told before the store has grown."""


async def _not_on_record(*_: Any) -> None:
    """The new size is not written down."""


DEFECTS: tuple[tuple[str, Any, str, Callable[..., Any], str], ...] = (
    ("the store does not grow", resize, "_grow_store", _no_store, "larger than its store|beyond the store"),
    (
        "the size is not on record",
        Binding,
        "resize",
        _not_on_record,
        "do not settle|never answered|is not live",
    ),
    (
        "the next daemon forgets the record of a resize",
        adoption,
        "_disk_of",
        lambda _parts, record: record.disk,
        "do not settle|never answered|is not live",
    ),
    ("the disk is not told later", device, "repair_soon", lambda _parts: None, "do not settle"),
)


@pytest.mark.parametrize(("owner", "name", "defect", "expected"), [each[1:] for each in DEFECTS],
                         ids=[each[0] for each in DEFECTS])  # fmt: skip
def test_a_defect_is_found(owner: Any, name: str, defect: Callable[..., Any], expected: str) -> None:
    with mock.patch.object(owner, name, defect):
        for seed in range(SEEDS):
            try:
                play(seed)
            except pytest.fail.Exception as failure:
                assert re.search(expected, str(failure).partition("\n")[0]), str(failure)
                return
    raise AssertionError(f"{SEEDS} seeds do not find it")
