"""A daemon with another build id, as a newer version has: `python -m support.vm.newer_daemon`."""

import uuid

from support.vm.patience import be_patient
from ublkpool.daemon.cli.commands import main
from ublkpool.daemon.device import context

if __name__ == "__main__":
    setattr(context, "build_id", lambda: uuid.uuid4().hex)  # noqa: B010
    be_patient()
    main()
