"""Workers, backends, broker, supervisor or all of them are killed at random, under verified fio and under ext4 in use.

`make soak` runs it longer: UBLKPOOL_SOAK_S seconds of fio, UBLKPOOL_SOAK_KILLS deaths for ext4; UBLKPOOL_SEED repeats a
run.
"""

import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import pytest

from support.vm.daemon import Daemon
from support.vm.files import (
    REAL_TREE,
    check_file_system,
    checksums,
    copy_tree,
    forget_cached,
    make_file_system,
    mounted,
)
from support.vm.process import Forked
from support.vm.recovery import add_disk, loaded, seeded, wait_for_backend
from support.vm.soak import Death

SOAK_S = float(os.environ.get("UBLKPOOL_SOAK_S", "20"))
EXT4_KILLS = int(os.environ.get("UBLKPOOL_SOAK_KILLS", "4"))
COPY_DEADLINE_S = 900.0


@pytest.fixture(scope="module")
def line_of_mortals() -> Iterator[Daemon]:
    """A daemon that the tests of this file may kill, and the daemons that follow it."""
    with Daemon(name="mortal").life() as daemon:
        yield daemon


@pytest.fixture
def mortal(
    line_of_mortals: Daemon, lend: Callable[[Daemon], AbstractContextManager[Daemon]]
) -> Iterator[Daemon]:
    with lend(line_of_mortals):
        yield line_of_mortals


def _report(capsys: pytest.CaptureFixture[str], what: str) -> None:
    with capsys.disabled():
        print(f"\nsoak: Linux {platform.release()}, {what}")


def _storm(mortal: Daemon, capsys: pytest.CaptureFixture[str], ways: list[tuple[str, str, int, str]]) -> None:
    devices = mortal.together(*(partial(add_disk, mortal, *way) for way in ways))
    with seeded() as rng, loaded(mortal, devices) as loads:
        # The memory of such a disk is the daemon's and its holder's: it ends with both.
        spared = ["everything"] if any(way[0] == "memory" and way[3] == "none" for way in ways) else []
        death = Death(mortal, [each.name for each in devices], rng, spared)
        end_s = time.monotonic() + SOAK_S
        while time.monotonic() < end_s:
            death.strike()
        death.rest()
        for load in loads:
            load.goes_on()
    done = [load.result for load in loads if load.result]
    moved = sum(each.written_bytes + each.read_bytes for each in done) >> 20
    names = ", ".join(each.name for each in devices)
    _report(
        capsys,
        f"{names}: fio for {SOAK_S:g} s, seed {rng.chosen}: {death.summary()}, {moved} MiB moved, 0 errors",
    )


def test_processes_killed_in_any_order_at_any_moment_cost_the_client_nothing(
    mortal: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    _storm(mortal, capsys, [("memory", "backend", 2, "process"), ("file", "pool", 4, "process")])


@pytest.mark.long
def test_the_same_with_engines_in_the_workers_and_with_overlays_costs_nothing(
    mortal: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    inside = [("file", "pool", 2, "none"), ("memory", "backend", 2, "none"), ("cow", "pool", 1, "none")]
    _storm(mortal, capsys, [*inside, ("cow", "backend", 2, "process")])


@pytest.mark.one_kernel("7.3")
def test_ext4_in_use_survives_every_death(mortal: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"path": mortal.path("fs.img"), "size": "160M"}
    path = mortal.add("fs", "file", options, queues=2).path
    enough = mortal.path("enough")
    assert path is not None
    make_file_system("ext4", path)
    with (
        seeded() as rng,
        mounted(path, mortal.path("mnt")) as root,
        Forked(lambda: _copy_until(enough, root)) as copier,
    ):
        death = Death(mortal, ["fs"], rng)
        backend = mortal.status("fs").backend.pid
        death.take("worker")
        death.take("backend")
        wait_for_backend(mortal, "fs", backend)
        # The next daemon starts with the mount in its namespace, and must not pin it.
        death.take("supervisor")
        while death.total < EXT4_KILLS:
            death.strike()
        death.rest()
        assert copier.running
        enough.touch()
        assert copier.wait(COPY_DEADLINE_S) == 0
        expected = checksums(root)
        assert len(expected) > 50
    check_file_system("ext4", path)
    with mounted(path, mortal.path("mnt")) as root:
        forget_cached()
        assert checksums(root) == expected
        assert _same_as_the_source(root / "0")
    mortal.delete("fs")
    _report(capsys, f"ext4, seed {rng.chosen}: {death.summary()}, {len(expected)} files whole, fsck clean")


def _copy_until(enough: Path, root: Path) -> int:
    """Copy a directory tree to the disk, over the last but one, until the file exists."""
    turn = 0
    while not enough.exists() or turn < 2:
        target = root / str(turn % 2)
        if target.exists():
            shutil.rmtree(target)
        target.mkdir()
        copy_tree(target)
        os.sync()
        turn += 1
    return 0


def _same_as_the_source(copy: Path) -> bool:
    return all(_python_files(copy / each.name) == _python_files(each) for each in REAL_TREE)


def _python_files(root: Path) -> dict[str, str]:
    return {name: found for name, found in checksums(root).items() if name.endswith(".py")}
