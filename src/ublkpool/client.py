"""Talk to the daemon from Python: `Client`, or `AsyncClient` for asyncio, in place of the command line.

    from ublkpool.client import Client

    client = Client()
    disk = client.add({"name": "vol0", "size": "1G", "backend": {"kind": "memory"}})
    print(disk.path)
    client.delete("vol0")

docs/CLIENT.md explains calls, errors and time limits.  Importing this module imports neither the command line nor
asyncio or ZeroMQ.
"""

from typing import TYPE_CHECKING, Any

from ublkpool.daemon.admin.calls import device_config as device_config
from ublkpool.daemon.admin.client import Client as Client
from ublkpool.daemon.admin.wire import ADMIN_VERSION as ADMIN_VERSION
from ublkpool.daemon.errors import BadAnswer as BadAnswer
from ublkpool.daemon.errors import BadRequest as BadRequest
from ublkpool.daemon.errors import ConfigError as ConfigError
from ublkpool.daemon.errors import DaemonError as DaemonError
from ublkpool.daemon.errors import DaemonSilent as DaemonSilent
from ublkpool.daemon.errors import DaemonStopping as DaemonStopping
from ublkpool.daemon.errors import DaemonUnreachable as DaemonUnreachable
from ublkpool.daemon.errors import DeviceExists as DeviceExists
from ublkpool.daemon.errors import DeviceInUse as DeviceInUse
from ublkpool.daemon.errors import NoSuchDevice as NoSuchDevice
from ublkpool.daemon.errors import OtherVersion as OtherVersion
from ublkpool.daemon.errors import RemoteError as RemoteError
from ublkpool.daemon.errors import TimedOut as TimedOut
from ublkpool.daemon.events.event import Event as Event
from ublkpool.daemon.settings.config import BackendConfig as BackendConfig
from ublkpool.daemon.settings.config import DeviceConfig as DeviceConfig
from ublkpool.daemon.status import BackendStatus as BackendStatus
from ublkpool.daemon.status import DaemonStatus as DaemonStatus
from ublkpool.daemon.status import DeviceStats as DeviceStats
from ublkpool.daemon.status import DeviceStatus as DeviceStatus
from ublkpool.daemon.status import PoolStats as PoolStats
from ublkpool.daemon.status import ProcessStatus as ProcessStatus
from ublkpool.daemon.status import QueueStats as QueueStats
from ublkpool.daemon.status import Reloaded as Reloaded
from ublkpool.daemon.status import ResizeResult as ResizeResult
from ublkpool.daemon.status import Setting as Setting
from ublkpool.daemon.status import WorkerStatus as WorkerStatus

if TYPE_CHECKING:
    from ublkpool.daemon.admin.async_client import AsyncClient as AsyncClient


def __getattr__(name: str) -> Any:
    # asyncio takes longer to import than everything else here.
    if name == "AsyncClient":
        from ublkpool.daemon.admin.async_client import AsyncClient

        return AsyncClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
