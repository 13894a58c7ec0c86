"""The daemon, with its calls watched: `python -m support.watched_daemon`; see `watched_calls.py`."""

import sys

from support.watched_calls import is_own, print_with_stack, watch
from ublkpool.daemon.cli import main


def watch_daemon() -> None:
    """Report calls on what is not below the run directory of the command line, or the daemon's own anyway."""
    run_dir = next(
        (after for word, after in zip(sys.argv, sys.argv[1:], strict=False) if word == "--run-dir"), "/run"
    )
    watch(lambda path: is_own(path, (run_dir,)), print_with_stack)


if __name__ == "__main__":
    watch_daemon()
    main()
