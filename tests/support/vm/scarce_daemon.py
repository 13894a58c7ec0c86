"""A daemon that may have few descriptors: as many as UBLKPOOL_TEST_DESCRIPTORS says."""

import os
import resource

from ublkpool.daemon.cli.commands import main

if __name__ == "__main__":
    limit = int(os.environ["UBLKPOOL_TEST_DESCRIPTORS"])
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    main()
