"""From a fork to a backend: what the child does before it is `ublkpool backend`, by exec or in a copy of the template.

Both become the same: a process group of their own, no input, one pipe for log and output, the operator's mounts, the
backend's directory, user and environment.
"""

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

from ublkpool.daemon.backends.backend_user import change_user
from ublkpool.daemon.errors import STATUS_USAGE
from ublkpool.daemon.processes.mounts import enter_live_view
from ublkpool.daemon.processes.reserve import restore_descriptor_limit
from ublkpool.daemon.settings.config import BackendConfig

TEMPLATE = "ublkpool-templ"
"""The template's name in `ps`."""
FORK = b"fork"
READY = b"ready"
PACKET_BYTES_MAX = 64
"""Of what daemon and template say to each other: `FORK` with the child's socket; `READY`, then for each child its
number, or a negative errno."""
_IN_ENVIRONMENT = """
import sys
try:
    from ublkpool.daemon.cli.commands import main
except ImportError as error:
    sys.stderr.write(f"ublkpool: {sys.executable}: {error}: install ublkpool in this environment, too\\n")
    sys.exit(2)
main()
"""


class Task(msgspec.Struct, frozen=True):
    """Which backend a process becomes."""

    arguments: list[str]
    """Of the command `ublkpool`."""
    config: BackendConfig
    group: int | None
    """That of the daemon's config, by which a backend of another user gets in."""


def be_a_program(stderr: int) -> None:
    """Leave the terminal's group and input; what is printed and logged goes to `stderr`.  Raises `OSError`."""
    # A terminal's Ctrl-C is the daemon's to handle: it ends its backends last.
    os.setpgid(0, 0)
    with Path(os.devnull).open() as nothing:
        os.dup2(nothing.fileno(), 0)
    # What it prints is for the log, too.
    os.dup2(stderr, 1)
    os.dup2(stderr, 2)


def take_default_signals() -> None:
    """Before an exec: the signals that this interpreter has changed are as at the start of a program."""
    for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)


def take_place(task: Task, live_mounts: int | None) -> Mapping[str, str]:
    """Enter directory, limits and user of the backend; its environment.

    The directory is looked up in the mount namespace `live_mounts`, which is entered first unless it is None.  Raises
    `LookupError`, `OSError`, `ValueError`.
    """
    if live_mounts is not None:
        enter_live_view(live_mounts, task.config.cwd or "/")
    elif task.config.cwd is not None:
        os.chdir(task.config.cwd)
    restore_descriptor_limit()
    return change_user(task.config, task.group)


def cannot(error: Exception) -> int:
    """Say on stderr why this process becomes no backend; its exit status."""
    is_user = isinstance(error, LookupError)
    os.write(2, f"ublkpool: cannot start it: {'backend.user: ' if is_user else ''}{error}\n".encode())
    return STATUS_USAGE if is_user else 1


def program(python: str | None) -> list[str]:
    """The command `ublkpool`, run by another environment's interpreter if one is given."""
    return [sys.executable, "-m", "ublkpool.daemon"] if python is None else [python, "-c", _IN_ENVIRONMENT]
