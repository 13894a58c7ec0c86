"""A daemon that logs calls which a disk can block: `python -m support.vm.watched_daemon`; see `watched_calls.py`."""

import os
import sys

from support.fakes.watched_calls import is_own, print_with_stack, watch
from support.vm.patience import be_patient
from ublkpool.daemon.cli.commands import main
from ublkpool.daemon.settings.user_directories import usual_run_dir, usual_state_dir


def watch_daemon() -> None:
    """Report calls on paths outside the daemon's own directories and files."""
    options = dict(zip(sys.argv, sys.argv[1:], strict=False))
    named = (options.get("--run-dir"), options.get("--state-dir"), os.environ.get("UBLKPOOL_STATE_DIR"))
    usual = (usual_run_dir(serves=True), usual_state_dir())
    own = tuple(str(each) for each in (*named, *usual) if each)
    watch(lambda path: is_own(path, own), print_with_stack)


if __name__ == "__main__":
    be_patient()
    watch_daemon()
    main()
