"""The limit on open files: raised in the daemon, as before in the backends that it runs."""

import os
import resource

from ublkpool.daemon.processes.reserve import raise_descriptor_limit, restore_descriptor_limit


def test_the_daemon_may_open_as_many_files_as_its_hard_limit_allows_and_a_backend_as_many_as_before() -> None:
    pid = os.fork()
    if not pid:
        status = 1
        try:
            before = (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
            raise_descriptor_limit()
            raised = resource.getrlimit(resource.RLIMIT_NOFILE)
            restore_descriptor_limit()
            restored = resource.getrlimit(resource.RLIMIT_NOFILE)
            status = 0 if raised == (before[1], before[1]) and restored == before else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
