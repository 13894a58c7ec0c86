"""The look at the running system, thin: each function asks the kernel or the daemon once."""

import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ublkpool.daemon.device.records import build_id
from ublkpool.daemon.device.state import candidates
from ublkpool.daemon.doctor.daemon import DaemonAnswer, ask_daemon
from ublkpool.daemon.doctor.features import Offered
from ublkpool.daemon.doctor.system import System
from ublkpool.daemon.kernel.device_commands import Owned, find_owned
from ublkpool.daemon.processes.left_behind import Process, is_alive
from ublkpool.ublk.control import get_features
from ublkpool.ublk.errors import UblkError


class Probes(NamedTuple):
    """What is asked of the running system; a test gives its own answers."""

    features: Callable[[], Offered]
    daemon: Callable[[Path], DaemonAnswer]
    owned: Callable[[str], Sequence[Owned]]
    is_alive: Callable[[Process], bool]
    build: Callable[[], str]


def running_system(run_dir: Path, state_dir: Path | None) -> System:
    """This machine, for a daemon with these directories; `state_dir`: None for the default."""
    return System(
        Path("/"), run_dir, tuple(candidates(run_dir, state_dir)), platform.release(), os.geteuid() == 0
    )


def running_probes() -> Probes:
    """The probes of the running system."""
    return Probes(ask_features, ask_daemon, find_owned, is_alive, build_id)


def ask_features() -> Offered:
    """GET_FEATURES."""
    try:
        return Offered(get_features())
    except UblkError as error:
        return Offered(None, str(error), error.errno)
