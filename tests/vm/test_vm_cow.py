"""The backend cow is killed again and again under fio, and the client sees neither an error nor a lost write."""

import json
import random
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from support.vm.daemon import Daemon, eventually, total
from support.vm.process import read_block
from support.vm.recovery import Load, Seeded, kill, seeded
from ublkpool.daemon.cli.commands import cli

KIB, MIB = 1 << 10, 1 << 20
BASE_BYTES, SIZE_BYTES = 8 * MIB, 16 * MIB
LOAD = {"size": 6 * MIB, "fsync": 32, "bssplit": "512/20:4k/40:12k/20:64k/20"}
BEHIND = 7 * MIB
"""In the base, where fio does not write."""
DISCARDED_BYTES = 4 * MIB
ANSWERED_MAX = 200
"""Of requests between two kills at the most."""


def volume(command: str, overlay: Path, *arguments: str) -> Result:
    """Run `ublkpool volume COMMAND cow overlay=...`, which needs no daemon."""
    return CliRunner().invoke(cli, ["volume", command, "cow", f"overlay={overlay}", *arguments])


def done(result: Result) -> str:
    """The output of a command that has succeeded."""
    assert result.exit_code == 0, result.output
    return result.stdout


def info(overlay: Path) -> dict[str, int]:
    """What `ublkpool volume info` tells of an overlay."""
    told: dict[str, int] = json.loads(done(volume("info", overlay, "--json")))
    return told


def content_of(path: str) -> bytes:
    """The whole disk, not from the page cache."""
    return b"".join(read_block(path, at, MIB) for at in range(0, SIZE_BYTES, MIB))


def kill_backend(daemon: Daemon) -> None:
    """Kill the backend of the device while it serves it."""
    # The daemon may not have seen yet that the one before is dead.
    eventually(lambda: kill(daemon.wait_live("cow").backend.pid or 0), "a backend is killed")


def storm(daemon: Daemon, path: str, overlay: Path, rng: Seeded, kills: int) -> None:
    """Kill the backend so many times while fio writes and verifies."""
    load = Load(daemon, daemon.status("cow"), **LOAD)
    try:
        for _ in range(kills):
            load.goes_on(rng.randrange(1, ANSWERED_MAX))
            kill_backend(daemon)
        load.goes_on(ANSWERED_MAX)
        refused = volume("reset", overlay)
        assert (refused.exit_code, "in use by process" in refused.output) == (2, True), refused.output
        load.end()
    finally:
        load.drop()
    stats = daemon.rest("cow")
    assert total(stats, "errors") == total(stats, "violations") == 0
    found = content_of(path)
    kill_backend(daemon)
    assert content_of(path) == found


def discard(path: str, overlay: Path) -> None:
    """A DISCARD of what fio wrote gives the overlay's space back, although another process wrote it."""
    before, taken_bytes = info(overlay), overlay.stat().st_blocks * 512
    assert before["own_bytes"] > DISCARDED_BYTES // 2 and taken_bytes >= before["own_bytes"]
    subprocess.run(["blkdiscard", "-l", str(DISCARDED_BYTES), path], check=True)
    after = info(overlay)
    freed_bytes = before["own_bytes"] - after["own_bytes"]
    assert freed_bytes > DISCARDED_BYTES // 2 and after["zero_bytes"] >= DISCARDED_BYTES
    assert taken_bytes - overlay.stat().st_blocks * 512 >= freed_bytes
    assert read_block(path, DISCARDED_BYTES - MIB, MIB) == bytes(MIB)


def check(daemon: Daemon, kills: int) -> None:
    """A disk from its first write to its commit and its reset, with a storm of kills in between."""
    base, overlay, committed = (daemon.path(name) for name in ("base", "overlay", "committed"))
    content = random.Random(1).randbytes(BASE_BYTES)
    base.write_bytes(content)
    options = {"base": base, "overlay": overlay, "size": SIZE_BYTES}
    with daemon.device("cow", "cow", options=options, queues=2, depth=32) as status, seeded() as rng:
        assert status.path is not None
        assert content_of(status.path) == content + bytes(SIZE_BYTES - BASE_BYTES)
        storm(daemon, status.path, overlay, rng, kills)
        assert read_block(status.path, BEHIND, MIB) == content[BEHIND:]
        discard(status.path, overlay)
        last = content_of(status.path)
    assert base.read_bytes() == content
    done(volume("commit", overlay, "--to", str(committed)))
    assert committed.read_bytes() == last
    done(volume("reset", overlay))
    assert (info(overlay)["own_bytes"], info(overlay)["zero_bytes"]) == (0, 0)
    with daemon.device("cow", "cow", options={"overlay": overlay}) as status:
        assert status.path is not None
        assert content_of(status.path) == content + bytes(SIZE_BYTES - BASE_BYTES)
    for each in (base, overlay, committed):
        each.unlink()


@pytest.mark.one_kernel("7.3")
def test_a_backend_killed_under_fio_costs_no_data_and_no_error(daemon: Daemon) -> None:
    check(daemon, 3)


@pytest.mark.long
def test_fifty_kills_cost_no_data_and_no_error(daemon: Daemon) -> None:
    check(daemon, 50)
