"""Seeded runs of a whole device: real workers, broker, recovery and SDK on a made-up kernel and backend's store.

One seed replays one run; `tests/support/sim/play.py` says which are played.
"""

import random
import re
from collections import Counter
from itertools import product
from typing import Any

import pytest

from support.sim import play as sim_play
from support.sim.defects import (
    BELL_NOT_RUNG,
    BUFFER_FREE_EARLY,
    COMMANDS_LIVE_ON,
    COMPLETION_LOST,
    CUT_OFF_LIVES,
    DOZES_BLINDLY,
    END_COMES_LATE,
    END_IS_BLIND,
    LEASE_FORGOTTEN,
    NO_FENCE,
    NO_REPLAY,
    PAUSES_COUNT,
    POOL_HANDED_ON,
    REGION_NOT_WANTED,
    STATE_LOST,
)
from support.sim.device_world import DeviceWorld
from support.sim.kernel import Model
from support.sim.processes import DeviceScenario, Victim
from support.sim.rings import LOST

SEEDS = 1080
MODELS: tuple[Model, ...] = ("6.12", "7.3")
ROADS = ("off", "pool", "backend")
KILLS: tuple[tuple[Victim, ...], ...] = (
    ("worker",),
    ("backend",),
    ("worker", "backend"),
    ("worker", "broker"),
    ("worker", "supervisor", "supervisor"),
    ("worker", "backend", "broker", "supervisor"),
)
SHAPES = tuple(product(MODELS, ROADS, KILLS, (False, True)))

CORNERS = (
    "worker killed",
    "worker killed in a recovery",
    "backend killed",
    "backend killed in a recovery",
    "broker killed",
    "broker killed in a recovery",
    "supervisor killed",
    "supervisor killed in a fork",
    "successions",
    "recoveries of what was left",
    "hurt recoveries",
    "replays",
    "rescues",
    "stale_answers",
    "violations",
    "requeues",
    "buffers_waited",
    "pools replaced",
)


def scenario(seed: int, rng: random.Random) -> DeviceScenario:
    """Seeds walk through every combination in turn; the rest is drawn."""
    model, road, victims, lies = SHAPES[seed % len(SHAPES)]
    queues, depth, block_bytes = rng.choice((1, 2, 2, 3)), rng.randint(1, 4), rng.choice((512, 512, 4096))
    return DeviceScenario(
        model=model,
        queues=queues,
        depth=depth,
        block_bytes=block_bytes,
        need_get_data=road != "off",
        place_in_backend=road == "backend",
        reads_own=road != "off" and rng.random() < 0.3,
        lies=lies,
        # Not drawn, so that the other seeds play on as they did.
        rings=seed // len(SHAPES) % 2 == 1,
        posts=road == "backend" and seed // len(SHAPES) % 3 == 1,
        scarce=seed // len(SHAPES) % 4 == 3,
        slow_state=seed // len(SHAPES) % 5 == 2,
        # None is prepared for larger blocks.
        prepared=seed // len(SHAPES) % 7 in (4, 5) and block_bytes == 512,
        steps=rng.choice((400, 800, 1600)),
        kills=tuple(rng.choice(victims) for _ in range(rng.randint(1, 5))),
    )


_counts: dict[int, Counter[str]] = {}
"""Of the seeds that were played as they are."""


CORNER_SEEDS_MAX = 6 * len(SHAPES)
"""Which seed reaches a corner changes with the code; frames and rings take turns, a round each."""


def play(seed: int, **changes: Any) -> DeviceWorld:
    """One run; see `play.play`."""
    world = sim_play.play(seed, scenario, DeviceWorld, **changes)
    if not changes:
        _counts[seed] = world.counts
    return world


@pytest.mark.parametrize("seeds", sim_play.chunks(SEEDS), ids=repr)
def test_after_any_deaths_every_request_is_answered_once_and_data_is_right(seeds: range) -> None:
    for seed in seeds:
        play(seed)


@pytest.mark.parametrize("seed", [5, len(SHAPES) + 5], ids=["frames", "rings"])
def test_a_seed_replays_its_run(seed: int) -> None:
    assert list(play(seed).trace) == list(play(seed).trace)


@pytest.mark.parametrize(
    ("first", "corners"),
    [
        (0, CORNERS),
        # Rings go with their worker: what a dead one was answered reaches no other.
        (len(SHAPES), tuple(each for each in CORNERS if each != "stale_answers")),
    ],
    ids=["frames", "rings"],
)
def test_the_runs_reach_every_corner(first: int, corners: tuple[str, ...]) -> None:
    reached, missing = Counter[str](), list(corners)
    for begin in range(first, first + CORNER_SEEDS_MAX, 2 * len(SHAPES)):
        for seed in range(begin, begin + len(SHAPES)):
            counts = _counts.get(seed) or play(seed).counts
            reached.update({corner for corner, count in counts.items() if count})
        missing = [corner for corner in corners if reached[corner] < 2]
        if not missing:
            return
    raise AssertionError(f"{missing} in none or one run: {reached}")


def test_a_device_of_a_prepared_one_dies_and_is_recovered_as_any() -> None:
    reached = Counter[str]()
    for seed in range(4 * len(SHAPES), 6 * len(SHAPES), 3):
        if scenario(seed, random.Random(seed)).prepared:
            reached.update(_counts.get(seed) or play(seed).counts)
    assert reached["made of a prepared one"] > 20 and reached["worker killed"] > 10, reached
    assert reached["successions"] + reached["recoveries of what was left"] > 2, reached


def test_writes_land_in_posted_regions_across_deaths() -> None:
    reached = Counter[str]()
    for seed in range(len(SHAPES), 2 * len(SHAPES)):
        if scenario(seed, random.Random(seed)).posts:
            reached.update(_counts.get(seed) or play(seed).counts)
    assert reached["posts_used"] > 20 and reached["rescues"] > 5 and reached["worker killed"] > 5, reached


def test_a_pause_of_everything_costs_no_healthy_backend_its_life_and_no_client_an_error() -> None:
    reached = Counter[str]()
    for seed in range(2 * len(SHAPES)):
        if not scenario(seed, random.Random(seed)).lies:
            world = play(seed, pauses=True)
            assert not world.counts["violations"], f"seed {seed}: a healthy backend is cut off"
            reached.update(world.counts)
    assert reached["pauses"] > 100 and reached["worker killed"] > 20 and reached["replays"] > 20, reached


SHARED = "has two users|stale write|has not let go|the kernel reads for|not the data of a write"
WRONG_DATA = "holds stamp|was left with stamp"
FOUR_WORKERS: dict[str, Any] = {"kills": ("worker",) * 4}
POOL: dict[str, Any] = {"need_get_data": True, "place_in_backend": False, "reads_own": False}
DEFECTS: tuple[tuple[str, int, dict[str, Any], str], ...] = (
    (NO_FENCE, 10, FOUR_WORKERS | POOL, SHARED),
    (NO_FENCE, 115, FOUR_WORKERS | POOL | {"blind": True}, WRONG_DATA),
    (BUFFER_FREE_EARLY, 13, {}, f"{SHARED}|{WRONG_DATA}"),
    (BUFFER_FREE_EARLY, 16, {"blind": True}, WRONG_DATA),
    (COMPLETION_LOST, 0, {}, "a request is never answered"),
    (POOL_HANDED_ON, 2, POOL | {"kills": ("backend",) * 4}, f"{SHARED}|{WRONG_DATA}"),
    (NO_REPLAY, 2, {}, "a request is never answered"),
    (CUT_OFF_LIVES, 4, FOUR_WORKERS | {"lies": True}, SHARED),
    (
        LEASE_FORGOTTEN,
        6,
        {"kills": ("broker",) * 4},
        f"buffers are lost|in its header|unusable grant|broken invariant|{SHARED}",
    ),
    (
        COMMANDS_LIVE_ON,
        1129,
        {"model": "6.12", "kills": ("worker", "supervisor") * 3, "steps": 1600},
        "the driver has not given up the dead workers' requests",
    ),
    (
        END_COMES_LATE,
        189,
        {"queues": 1, "model": "6.12", "kills": ("worker",) * 5},
        "the driver has not given up the dead workers' requests",
    ),
    (
        END_IS_BLIND,
        47,
        {"queues": 3, "model": "6.12", "kills": ("worker",) * 5},
        "a request goes to a command that was cancelled",
    ),
    (PAUSES_COUNT, 3, {"pauses": True, "lies": False}, "a healthy backend is cut off|failed"),
    (BELL_NOT_RUNG, 72, {}, LOST),
    (DOZES_BLINDLY, 72, {}, LOST),
    (
        REGION_NOT_WANTED,
        72,
        {"rings": True, "place_in_backend": True, "need_get_data": True, "scarce": True},
        LOST,
    ),
    (STATE_LOST, 5, {"kills": ("supervisor", "backend") * 3}, "generation [12] comes after"),
)
SEARCHED_MAX = 500


@pytest.mark.parametrize(
    ("defect", "seed", "changes", "expected"),
    DEFECTS,
    ids=[f"{defect}{', blind' * changes.get('blind', False)}" for defect, _, changes, _ in DEFECTS],
)
def test_a_defect_is_found(defect: str, seed: int, changes: dict[str, Any], expected: str) -> None:
    """Each names the seed that finds it, and which invariant does.

    What a seed plays changes with the code; the next one that finds it will do, as long as it says the same, and
    without the defect nothing is found there.
    """
    found, complaint = _first_found(defect, seed, changes)
    print(f"{defect}: seed {found}: {complaint}")
    assert re.search(expected, complaint), f"seed {found} finds something else: {complaint}"
    play(found, **changes)


def _first_found(defect: str, first: int, changes: dict[str, Any]) -> tuple[int, str]:
    for seed in range(first, first + SEARCHED_MAX):
        try:
            play(seed, defect=defect, **changes)
        except pytest.fail.Exception as failure:
            return seed, str(failure).partition("\n")[0]
    raise AssertionError(f"{SEARCHED_MAX} seeds from {first} on do not find it")
