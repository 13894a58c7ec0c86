"""A daemon with another build id, as a newer version has: `python -m support.vm.newer_daemon`.

Its deadline for QUIESCE_DEV is longer, because the guest is slow.
"""

import uuid

from ublkpool.daemon.cli.commands import main
from ublkpool.daemon.device import context, recovery

QUIESCE_DEADLINE_S = 60.0

if __name__ == "__main__":
    setattr(context, "build_id", lambda: uuid.uuid4().hex)  # noqa: B010
    setattr(recovery, "QUIESCE_DEADLINE_S", QUIESCE_DEADLINE_S)  # noqa: B010
    main()
