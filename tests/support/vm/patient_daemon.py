"""A daemon whose workers have no periodic tick: `python -m support.vm.patient_daemon`.

So an event that a worker misses stays missed, and a test sees it.
"""

from support.vm.patience import be_patient
from ublkpool.daemon.cli.commands import main
from ublkpool.workers import queue_loop

TICK_MS = 3_600_000

if __name__ == "__main__":
    be_patient()
    setattr(queue_loop, "TICK_MS", TICK_MS)  # noqa: B010
    main()
