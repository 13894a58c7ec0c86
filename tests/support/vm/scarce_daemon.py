"""A daemon with a limit of UBLKPOOL_TEST_DESCRIPTORS open files."""

import os
import resource

from support.vm.patience import be_patient
from ublkpool.daemon.cli.commands import main

if __name__ == "__main__":
    be_patient()
    limit = int(os.environ["UBLKPOOL_TEST_DESCRIPTORS"])
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    main()
