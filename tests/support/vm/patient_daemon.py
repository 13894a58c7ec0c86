"""A daemon whose workers wait for what happens and look around at no other time: `python -m support.vm.patient_daemon`.

What a worker overlooks then stays overlooked.
"""

from ublkpool.daemon.cli.commands import main
from ublkpool.workers import queue_loop

TICK_MS = 3_600_000

if __name__ == "__main__":
    setattr(queue_loop, "TICK_MS", TICK_MS)  # noqa: B010
    main()
