"""The pool's sizes: buffers never overlap, and every queue can proceed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ublkpool.bufpool.errors import PoolError
from ublkpool.bufpool.pool.limits import Geometry, SizeClass, pool_geometry

KIB = 1 << 10
MIB = 1 << 20


def test_without_need_get_data_every_tag_has_a_buffer_of_the_largest_size() -> None:
    geometry, reserve = pool_geometry(4, 128, 512 * KIB, False, "pool")
    assert [(each.buffer_bytes, each.count) for each in geometry.classes] == [(512 * KIB, 4 * 128)]
    assert reserve == (128,)


def test_with_need_get_data_small_buffers_are_many_and_large_ones_few() -> None:
    geometry, reserve = pool_geometry(2, 128, MIB, True, "pool")
    assert [(each.buffer_bytes, each.count) for each in geometry.classes] == [
        (4 * KIB, 2 * (128 + 32)),
        (64 * KIB, 2 * (32 + 8)),
        (MIB, 2 * (8 + 2)),
    ]
    assert reserve == (1, 1, 1)


def test_placement_by_the_backend_needs_a_smaller_pool() -> None:
    by_worker, _ = pool_geometry(2, 128, MIB, True, "pool")
    by_backend, _ = pool_geometry(2, 128, MIB, True, "backend")
    assert by_backend.total_bytes < by_worker.total_bytes


@pytest.mark.parametrize(
    ("max_io_bytes", "sizes"),
    [
        (512, [4 * KIB]),
        (4 * KIB, [4 * KIB]),
        (6000, [4 * KIB, 8 * KIB]),
        (64 * KIB, [4 * KIB, 64 * KIB]),
        (4 * MIB, [4 * KIB, 64 * KIB, MIB, 4 * MIB]),
    ],
)
def test_sizes_that_coincide_are_one_class(max_io_bytes: int, sizes: list[int]) -> None:
    geometry, _ = pool_geometry(1, 8, max_io_bytes, True, "pool")
    assert [each.buffer_bytes for each in geometry.classes] == sizes


def test_a_pool_below_its_reserve_is_refused_and_the_error_names_the_minimum() -> None:
    needed = 2 * (4 * KIB + 64 * KIB + MIB)
    geometry, reserve = pool_geometry(2, 16, MIB, True, "pool", pool_bytes=needed)
    assert [each.count for each in geometry.classes] == [2 * each for each in reserve]
    with pytest.raises(PoolError, match=f"2 queues of .* need {needed}"):
        pool_geometry(2, 16, MIB, True, "pool", pool_bytes=needed - 1)
    with pytest.raises(PoolError, match=r"^pool of \d+ bytes is too small"):
        pool_geometry(2, 16, MIB, False, "pool", pool_bytes=32 * MIB - 1)


def test_a_pool_is_never_larger_than_its_queues_can_use() -> None:
    geometry, _ = pool_geometry(1, 4, MIB, True, "pool", pool_bytes=1 << 40)
    assert all(each.count <= 4 + 4 for each in geometry.classes)


@given(
    queues=st.integers(1, 64),
    depth=st.integers(1, 4096),
    max_io_bytes=st.integers(512, 32 * MIB),
    mode=st.sampled_from([(False, "pool"), (True, "pool"), (True, "backend")]),
    pool_bytes=st.none() | st.integers(0, 1 << 34),
)
def test_every_geometry_covers_its_reserves_and_stays_in_its_bytes(
    queues: int, depth: int, max_io_bytes: int, mode: tuple[bool, str], pool_bytes: int | None
) -> None:
    need_get_data, placement = mode
    try:
        geometry, reserve = pool_geometry(
            queues,
            depth,
            max_io_bytes,
            need_get_data,
            placement,  # type: ignore[arg-type]
            pool_bytes,
        )
    except PoolError:
        assert pool_bytes is not None
        return
    assert geometry.classes[-1].buffer_bytes >= max_io_bytes
    assert all(
        1 <= each <= size.count // queues for each, size in zip(reserve, geometry.classes, strict=True)
    )
    assert pool_bytes is None or geometry.total_bytes <= pool_bytes


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 40)), min_size=1, max_size=8))
def test_buffers_are_page_aligned_and_never_overlap(steps: list[tuple[int, int]]) -> None:
    pages, pairs = 0, []
    for step, count in steps:
        pages += step
        pairs.append((pages * 4096, count))
    geometry = Geometry.build(pairs)
    end = 0
    for slot in range(geometry.slot_count):
        offset = geometry.slot_offset(slot)
        assert offset == end and offset % 4096 == 0
        end += geometry.classes[geometry.class_of(slot)].buffer_bytes
    assert end == geometry.total_bytes


@pytest.mark.parametrize("slot", [-1, 2])
def test_a_slot_outside_the_pool_has_no_place(slot: int) -> None:
    geometry = Geometry.build([(4096, 1), (65536, 1)])
    with pytest.raises(PoolError, match="none of the pool's 2"):
        geometry.slot_offset(slot)


@pytest.mark.parametrize(
    "pairs",
    [
        [],
        [(4096, 1)] * 2,
        [(8192, 1), (4096, 1)],
        [(4095, 1)],
        [(4096, 0)],
        [(4096 * k, 1) for k in range(1, 10)],
    ],
)
def test_a_geometry_that_does_not_ascend_in_pages_is_refused(pairs: list[tuple[int, int]]) -> None:
    with pytest.raises(PoolError):
        Geometry.build(pairs)


def test_a_geometry_with_holes_or_too_many_slots_is_refused() -> None:
    with pytest.raises(PoolError, match="do not follow"):
        Geometry((SizeClass(4096, 1, 0, 0), SizeClass(8192, 1, 1, 8192))).check()
    with pytest.raises(PoolError, match="32 bits"):
        Geometry.build([(4096, 1 << 32)])


@pytest.mark.parametrize(
    ("queues", "depth", "max_io_bytes", "need_get_data", "placement"),
    [
        (0, 1, 4096, True, "pool"),
        (4097, 1, 4096, True, "pool"),
        (1, 0, 4096, True, "pool"),
        (1, 4097, 4096, True, "pool"),
        (1, 1, 0, True, "pool"),
        (1, 1, 33 * MIB, True, "pool"),
        (1, 1, 4096, False, "backend"),
    ],
)
def test_a_device_that_the_driver_would_refuse_has_no_pool(
    queues: int, depth: int, max_io_bytes: int, need_get_data: bool, placement: str
) -> None:
    with pytest.raises(PoolError):
        pool_geometry(queues, depth, max_io_bytes, need_get_data, placement)  # type: ignore[arg-type]
