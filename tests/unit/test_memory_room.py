"""The memory that is available to a pool: the machine's, and that of every cgroup of the daemon."""

from pathlib import Path

import pytest

from ublkpool.bufpool import memory_room
from ublkpool.bufpool.errors import PoolError
from ublkpool.bufpool.memory_room import check_room

MIB = 1 << 20


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """100 MiB available, in the cgroup /outer/inner, neither of which has a limit."""
    (tmp_path / "meminfo").write_text("MemTotal: 999999 kB\nMemAvailable: 102400 kB\nHugePages_Total: 0\n")
    (tmp_path / "cgroup").write_text("0::/outer/inner\n")
    inner = tmp_path / "groups/outer/inner"
    inner.mkdir(parents=True)
    for group in (inner, inner.parent):
        limit(group, "max", 7 * MIB)
    monkeypatch.setattr(memory_room, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory_room, "OWN_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(memory_room, "CGROUP_ROOT", tmp_path / "groups")
    return tmp_path


def limit(group: Path, most: int | str, current: int, cache: int = 0) -> None:
    (group / "memory.max").write_text(f"{most}\n")
    (group / "memory.current").write_text(f"{current}\n")
    (group / "memory.stat").write_text(
        f"anon 1\nshmem 5\ninactive_file {cache // 2}\nactive_file {cache // 2}\n"
    )


def refusal(size_bytes: int) -> str:
    with pytest.raises(PoolError) as refused:
        check_room("the pool of device 7", size_bytes, "lower the device's queues, depth or pool")
    return str(refused.value)


def test_a_pool_fits_the_machines_memory_or_is_refused_with_both_figures(machine: Path) -> None:
    check_room("it", 100 * MIB, "")
    assert refusal(100 * MIB + 1) == (
        "the pool of device 7 needs 100.0 MiB of memory and 100.0 MiB are available (MemAvailable): "
        "lower the device's queues, depth or pool"
    )


@pytest.mark.parametrize("group", ["outer", "outer/inner"])
def test_the_limit_of_each_cgroup_on_the_way_counts_and_is_named(machine: Path, group: str) -> None:
    path = machine / "groups" / group
    limit(path, 50 * MIB, 20 * MIB)
    check_room("it", 30 * MIB, "")
    assert f"30.0 MiB are available (memory.max of the cgroup {path})" in refusal(31 * MIB)


def test_page_cache_in_a_cgroup_is_as_good_as_free(machine: Path) -> None:
    limit(machine / "groups/outer", 50 * MIB, 50 * MIB, cache=16 * MIB)
    check_room("it", 16 * MIB, "")
    assert "16.0 MiB are available" in refusal(17 * MIB)


def test_a_cgroup_above_its_limit_has_no_room(machine: Path) -> None:
    limit(machine / "groups/outer", 50 * MIB, 60 * MIB)
    assert "and 0.0 MiB are available" in refusal(1)


@pytest.mark.parametrize("own", ["", "1:memory:/old\n", "0::/gone\n", "0::/\n"])
def test_without_cgroups_of_version_2_the_machine_alone_counts(machine: Path, own: str) -> None:
    (machine / "cgroup").write_text(own)
    check_room("it", 100 * MIB, "")


def test_without_any_figures_no_pool_is_refused(machine: Path) -> None:
    (machine / "cgroup").unlink()
    (machine / "meminfo").write_text("nonsense\n")
    check_room("it", 1 << 50, "")
