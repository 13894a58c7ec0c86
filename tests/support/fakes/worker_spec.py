"""The specification of a worker as tests have it: a small queue, no place on a CPU, no polling."""

from pathlib import Path
from typing import Any

from support.fakes.queue_rig import DEVICE, Plan
from ublkpool.ublk.queue import BufferClass, QueueConfig
from ublkpool.workers.queue_loop import WorkerSpec

DEPTH = 4


def queue_config(classes: tuple[BufferClass, ...] = (), **changes: Any) -> QueueConfig:
    """A queue of four tags in its first epoch, which asks where each write's data shall go."""
    config: dict[str, Any] = {
        "device_number": DEVICE,
        "queue": 0,
        "depth": DEPTH,
        "epoch": 1,
        "max_io_bytes": Plan().max_io_bytes,
        "block_bytes": 512,
        "need_get_data": True,
        "place_in_backend": False,
        "timeout_ms": 0,
        "fail_on_timeout": False,
    }
    return QueueConfig(**{**config, "classes": classes, **changes})


def worker_spec(queue: QueueConfig, queue_socket: Path, **changes: Any) -> WorkerSpec:
    """A worker of that queue, whose backends connect at `queue_socket`; without rings, broker and engine."""
    spec: dict[str, Any] = {
        "name": "vol",
        "ring_socket": None,
        "pool_endpoint": None,
        "socket_mode": 0o600,
        "socket_group": None,
        "cpu": None,
        "spin_us": 0,
    }
    return WorkerSpec(queue=queue, queue_socket=queue_socket, **{**spec, **changes})
