"""The choice of a worker's CPU."""

import pytest

from ublkpool.daemon.settings.affinity import cpu_for, parse_cpus

ALL = range(8)


def test_a_worker_is_on_one_of_its_queues_cpus() -> None:
    queues = [[0, 4], [1, 5], [2, 6], [3, 7]]
    for device in range(3):
        for queue, cpus in enumerate(queues):
            assert cpu_for("auto", device, queue, cpus, ALL) in cpus


def test_queues_and_devices_that_may_use_all_cpus_get_different_ones() -> None:
    assert [cpu_for("auto", 0, queue, ALL, ALL) for queue in range(8)] == list(ALL)
    assert [cpu_for("auto", device, 0, ALL, ALL) for device in range(8)] == list(ALL)


def test_off_or_no_allowed_cpu_of_the_queue_leaves_the_choice_to_the_scheduler() -> None:
    assert cpu_for("off", 0, 0, ALL, ALL) is None
    assert cpu_for("auto", 0, 0, [0, 1], [2, 3]) is None


@pytest.mark.parametrize(
    ("affinity", "cpus"),
    [
        ("4-7", [4]),  # that the queue has as well
        ("6,7", [6, 7]),  # where the queue has none, any of them
        ("2,9", [2]),  # of those that we may use
        ("9", [None]),
    ],
)
def test_a_list_restricts_the_choice(affinity: str, cpus: list[int | None]) -> None:
    assert {cpu_for(affinity, device, 0, [0, 4], ALL) for device in range(4)} == set(cpus)


def test_lists_have_the_kernels_format() -> None:
    assert parse_cpus("0-3,8") == {0, 1, 2, 3, 8}
    assert parse_cpus("5") == {5}
    with pytest.raises(ValueError, match="names no CPU"):
        parse_cpus("3-1")
