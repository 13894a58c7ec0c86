"""Seeded runs of the queue core between a fake driver and fake backends.

One seed replays one run; `tests/support/sim/play.py` says which are played.
"""

import random
from itertools import product

import msgspec
import pytest

from support.fakes.queue_rig import Plan
from support.sim import play as sim_play
from support.sim.queue_world import ENDS, Scenario, Temper, World

SEEDS = 1440
ROADS = ("off", "pool", "backend")
TEMPERS: tuple[Temper, ...] = ("honest", "dying", "lying")
SHAPES = tuple(product(ROADS, (1, 4), (False, True), TEMPERS, (False, True)))

CORNERS = (
    "errors",
    "buffers_waited",
    "requeues",
    "short_copies",
    "replays",
    "rescues",
    "violations",
    "stale_answers",
    "timeouts",
    "unsupported",
)


def scenario(seed: int, rng: random.Random) -> Scenario:
    """Seeds walk through every combination in turn; the rest is drawn."""
    road, queues, reads_own, temper, deadlines = SHAPES[seed % len(SHAPES)]
    plan = Plan(
        queues=queues,
        depth=rng.randint(1, 8),
        block_bytes=rng.choice((512, 512, 4096)),
        need_get_data=road != "off",
        place_in_backend=road == "backend",
        reads_own=reads_own,
        timeout_ms=rng.choice((300, 2000)) if deadlines else 0,
        fail_on_timeout=deadlines and rng.random() < 0.5,
        spare=rng.choice((0, 1, 2, 8)),
        # Not drawn, so that older seeds play on as they did.
        absent_ms=20 if seed % 5 == 4 else 0,
        posts=road == "backend" and seed // len(SHAPES) % 2 == 1,
    )
    return Scenario(plan=plan, temper=temper, end=rng.choice(ENDS), steps=rng.choice((300, 600, 1200)))


def play(seed: int, **changes: bool) -> World:
    """One run; see `play.play`."""
    return sim_play.play(seed, scenario, World, **changes)


@pytest.mark.parametrize("seeds", sim_play.chunks(SEEDS), ids=repr)
def test_in_any_order_of_events_data_is_right_and_every_request_is_answered_once(seeds: range) -> None:
    for seed in seeds:
        play(seed)


def test_a_seed_replays_its_run() -> None:
    assert list(play(4).trace) == list(play(4).trace)


def test_a_backend_that_reuses_a_region_before_its_release_is_found_out() -> None:
    """Seeds 51 (a death) and 52 (a cut) rescue a write from a region whose unheard DONE came before its reuse."""
    found = [seed for seed in range(48, 56) if _fails(seed)]
    assert found, "no run reports the reuse"


def _fails(seed: int) -> bool:
    try:
        play(seed, reuses_answered=True)
    except pytest.fail.Exception as failure:
        return "not the data of" in str(failure)
    return False


def test_the_runs_reach_every_corner() -> None:
    worlds = [play(seed) for seed in range(len(SHAPES))]
    for corner in CORNERS:
        reached = sum(getattr(side.statistics, corner) for world in worlds for side in world.rig.sides)
        assert reached > 5, f"{reached} {corner} in {len(worlds)} runs"
    assert sum(world.absences for world in worlds) > 5


def with_clients(seed: int, rng: random.Random) -> Scenario:
    """As `scenario`, with a client area."""
    drawn = scenario(seed, rng)
    plan = drawn.plan
    slice_bytes = plan.queues * plan.depth * plan.max_io_bytes
    return msgspec.structs.replace(drawn, plan=msgspec.structs.replace(plan, slice_bytes=slice_bytes))


@pytest.mark.parametrize("seeds", sim_play.chunks(2 * len(SHAPES)), ids=repr)
def test_requests_in_clients_own_memory_are_served_there_in_any_order_of_events(seeds: range) -> None:
    worlds = [sim_play.play(seed, with_clients, World) for seed in seeds]
    statistics = [side.statistics for world in worlds for side in world.rig.sides]
    assert sum(each.zero_copies for each in statistics) > len(seeds)
    assert sum(each.replays for each in statistics) > 0


def with_limits(seed: int, rng: random.Random) -> Scenario:
    """As `scenario`, with limits."""
    drawn = scenario(seed, rng)
    return msgspec.structs.replace(
        drawn,
        iops=rng.choice((0, 100, 1000)),
        bytes_per_s=rng.choice((0, 200_000, 2_000_000)),
        burst_ns=rng.choice((0, 10_000_000, 100_000_000)),
    )


@pytest.mark.parametrize("seeds", sim_play.chunks(2 * len(SHAPES)), ids=repr)
def test_limits_are_never_exceeded_and_lose_no_request_in_any_order_of_events(seeds: range) -> None:
    worlds = [sim_play.play(seed, with_limits, World) for seed in seeds]
    statistics = [side.statistics for world in worlds for side in world.rig.sides]
    assert sum(each.limited for each in statistics) > len(seeds)


def test_writes_land_in_what_was_posted_and_are_rescued_from_there() -> None:
    worlds = [play(seed) for seed in range(len(SHAPES), 2 * len(SHAPES))]
    statistics = [side.statistics for world in worlds for side in world.rig.sides]
    assert sum(each.posts_used for each in statistics) > 40
    assert sum(each.rescues for each in statistics if each.posts_used) > 5
