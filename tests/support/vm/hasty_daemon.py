"""A daemon with deadlines of five seconds for processes that hang: `python -m support.vm.hasty_daemon`."""

from support.vm.patience import be_patient
from support.vm.watched_daemon import watch_daemon
from ublkpool.daemon.backends import managed_backend
from ublkpool.daemon.cli.commands import main
from ublkpool.daemon.device import attached_backend, resources

PATIENCE_S = 5.0

if __name__ == "__main__":
    be_patient()
    setattr(resources, "STOP_DEADLINE_S", PATIENCE_S)  # noqa: B010
    setattr(attached_backend, "DETACH_PATIENCE_S", PATIENCE_S)  # noqa: B010
    setattr(attached_backend, "DEATH_PATIENCE_S", PATIENCE_S)  # noqa: B010
    setattr(managed_backend, "END_PATIENCE_S", PATIENCE_S)  # noqa: B010
    setattr(managed_backend, "DEATH_PATIENCE_S", PATIENCE_S)  # noqa: B010
    watch_daemon()
    main()
