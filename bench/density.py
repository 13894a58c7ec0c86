"""How fast devices come and go beside kublk's and nbd-client's.

All devices have one queue, depth 128 and requests up to 512 KiB, and the engine `null`; nbd-client has one connection
to an nbdkit that runs.  An add ends when the node has been opened and read, a del when the node is gone, or
disconnected.  Contestants take turns, so that a busy host hits all alike.  Many devices at once are `crowd.py`.
"""

import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bench.cells import REGION_BYTES
from bench.crowd import measure_crowd
from bench.density_results import Density, Life
from bench.measure import FAILURES
from bench.nbd_clients import shared_nbdkit
from bench.peers import load_module, nbd_client
from bench.stage import Stage, read_first_block, run, wait_for
from support.vm.daemon import Daemon
from ublkpool.daemon.settings.config import BackendConfig, DeviceConfig

FILES_MAX = 65536
"""How many files the daemon may have open: LimitNOFILE of its unit.  A device takes nine of them."""
PREPARED = "[prepare]\ncount = 1\npartitions = false\n"
Say = Callable[[str], None]


def measure_density(
    stage: Stage, density: Density, say: Say, keep: Callable[[Density], None], devices: int, rounds: int
) -> None:
    """Run both parts; a failure does not end the other one."""
    _let_daemons_open_many_files()
    for part in (partial(_lives, rounds=rounds), partial(measure_crowd, devices=devices, keep=keep)):
        try:
            part(stage, density, say)
        except FAILURES as error:
            density.errors.append(" ".join(str(error).split())[:300])
            say(f"FAILED: {density.errors[-1]}")
        keep(density)


def _let_daemons_open_many_files() -> None:
    """Raise the hard limit of this process, which its daemons inherit, to the unit's."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, max(hard, FILES_MAX)))


def _config(name: str, **config: Any) -> DeviceConfig:
    backend = BackendConfig(kind="null", options={"size": str(REGION_BYTES)}, cwd="/")
    return DeviceConfig(name=name, backend=backend, **config)


class _Way(NamedTuple):
    """How a device of ours is added: by which daemon, and with which config."""

    daemon: Daemon
    config: Callable[[str], DeviceConfig]


def _lives(stage: Stage, density: Density, say: Say, rounds: int) -> None:
    preparing = stage.other_daemon("prepared", PREPARED)
    try:
        _rounds(stage, preparing, density, say, rounds)
    finally:
        # What it prepares would count as left of the many.
        preparing.stop()


def _rounds(stage: Stage, preparing: Daemon, density: Density, say: Say, rounds: int) -> None:
    fast = partial(_config, isolation="none", partitions=False)
    ours = {
        "isolation none": _Way(stage.daemon, partial(_config, isolation="none")),
        "isolation none, no partition scan": _Way(stage.daemon, fast),
        "the same, prepared": _Way(preparing, fast),
        "isolation process": _Way(stage.daemon, _config),
    }
    for number in range(rounds):
        density.lives += [_kublk(stage), _nbd(stage)]
        density.lives += [_of_ours(what, way, f"life{number}") for what, way in ours.items()]
    for each in density.lives[-len(ours) - 2 :]:
        say(f"{each.what}: add {each.add_ms:.0f} ms, del {each.del_ms:.0f} ms")


def _of_ours(what: str, way: _Way, name: str) -> Life:
    client = way.daemon.client
    wanted = client.daemon().prepared_wanted
    wait_for(lambda: client.daemon().prepared == wanted, "devices are prepared")
    begun_s = time.monotonic()
    status = client.add(way.config(name))
    assert status.path is not None
    read_first_block(status.path)
    added_s = time.monotonic()
    client.delete([name])
    _await_gone(status.path)
    return _life(what, begun_s, added_s, time.monotonic())


def _kublk(stage: Stage) -> Life:
    number = stage.next_number()
    node = f"/dev/ublkb{number}"
    begun_s = time.monotonic()
    run(stage.kublk, "add", "-t", "null", "-q", "1", "-d", "128", "-n", str(number))
    read_first_block(node)
    added_s = time.monotonic()
    run(stage.kublk, "del", "-n", str(number))
    _await_gone(node)
    return _life("kublk", begun_s, added_s, time.monotonic())


def _nbd(stage: Stage) -> Life:
    load_module("nbd")
    socket, _pid = shared_nbdkit(stage)
    begun_s = time.monotonic()
    with nbd_client(socket, connections=1) as node:
        read_first_block(node)
        added_s = time.monotonic()
    connected = Path(f"/sys/block/{Path(node).name}/pid")
    wait_for(lambda: not connected.exists(), f"{node} is disconnected")
    return _life("nbd-client", begun_s, added_s, time.monotonic())


def _life(what: str, begun_s: float, added_s: float, gone_s: float) -> Life:
    return Life(what=what, add_ms=(added_s - begun_s) * 1e3, del_ms=(gone_s - added_s) * 1e3)


def _await_gone(node: str) -> None:
    wait_for(lambda: not Path(node).exists(), f"{node} is gone")
