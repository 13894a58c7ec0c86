"""What all devices of a daemon share: directories, the runner of control commands, the broker, the holder, the
events.

The supervisor makes it once; devices use it and never change it.
"""

from pathlib import Path

from ublkpool.daemon.backends.template_process import BackendTemplate
from ublkpool.daemon.device.binding import boot_id
from ublkpool.daemon.device.memory import MemoryBudget
from ublkpool.daemon.device.records import Records, build_id
from ublkpool.daemon.device.state import StateDirectory
from ublkpool.daemon.events.tell import Events
from ublkpool.daemon.kernel.control_process import ControlRunner
from ublkpool.daemon.processes.broker_process import BrokerProcess
from ublkpool.daemon.processes.holder import Holder
from ublkpool.daemon.processes.worker_template import WorkerTemplate
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.workers.privileges import Account


class DaemonContext:
    """What all devices of a daemon share."""

    def __init__(
        self,
        run_dir: Path,
        instance: str,
        group: int | None,
        runner: ControlRunner,
        pool_broker: BrokerProcess,
        holder: Holder,
        states: StateDirectory,
        live_mounts: int | None = None,
        events: Events | None = None,
        account: Account | None = None,
        template: BackendTemplate | None = None,
        worker_template: WorkerTemplate | None = None,
    ) -> None:
        """`live_mounts`: a descriptor of the mount namespace in which backends run and a reload reads the config, see
        `daemon/processes/mounts.py`.  `account`: the user that workers and broker become; None: they keep the daemon's
        rights.  `template`: what forks the daemon's own backends; None: they are started by exec.
        `worker_template`: what forks workers; None: the daemon does.
        """
        self.run_dir = run_dir
        self.instance = instance
        self.group = group
        self.account = account
        self.template = template
        self.worker_template = worker_template
        self.runner = runner
        self.broker = pool_broker
        self.holder = holder
        self.states = states
        self.boot_id = boot_id()
        self.live_mounts = live_mounts
        self.build = build_id()
        self.events = events or Events()
        self.records = Records(run_dir / "devices")
        self.queue_dir = run_dir / "queues"
        self.configured: dict[str, DeviceConfig] = {}
        """What the config file, as it was last read, says of the devices in it."""
        self.budget = MemoryBudget()
        self.is_privileged = True
        """Whether the driver takes this daemon for root's; else its devices are an ordinary user's."""
        self.offered = -1
        """The bits of `Feature` that the driver offers; all of them until it has been asked."""
