"""How ublkpool's own contestants are started: a device of the one daemon, and a backend process of its own."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal

from bench.cells import REGION_BYTES
from bench.results import Transport
from bench.stage import DEADLINE_S, Disk, Disks, Stage, process
from ublkpool.daemon.admin_client import AdminClient
from ublkpool.daemon.errors import DaemonError

QUEUES = 2
BACKENDS = Path(__file__).parent / "backends"
Start = Callable[[Stage, str], AbstractContextManager[Disks]]


def backend(
    kind: str,
    *,
    transport: Transport = "",
    placement: Literal["pool", "backend"] = "pool",
    options: Mapping[str, object] | None = None,
    file: str = "",
    **config: Any,
) -> Start:
    """A device with this backend over this transport; `file` names the option that takes a path on tmpfs."""

    @contextmanager
    def start(stage: Stage, name: str) -> Iterator[Disks]:
        daemon = stage.daemon
        given = dict(options if options is not None else {"size": REGION_BYTES})
        if file:
            given = {file: stage.make_file(f"{name}.img")}
        command = [
            *daemon.command("backend", kind, "--device", name),
            *(["--transport", transport] if transport else []),
            "--",
            *(f"{key}={value}" for key, value in given.items()),
        ]
        # Tests divide their devices among the transports; here each backend says which it wants.
        daemon.add(name, **{"rings": True, "queues": QUEUES, "placement": placement, **config})
        log = stage.directory / f"{name}.log"
        try:
            with process(command, log, daemon.environment()) as pid:
                yield Disks(_disk(daemon.client, name, pid, daemon.pid, daemon.broker_pid))
                daemon.client.delete([name], force=True)
        except DaemonError as error:
            raise DaemonError(f"{error}; {_last_words(log)}") from error

    return start


@contextmanager
def alone(stage: Stage, name: str) -> Iterator[Disks]:
    """A device whose workers answer themselves."""
    daemon = stage.daemon
    daemon.add(name, answers="worker", queues=QUEUES, size_bytes=REGION_BYTES)
    yield Disks(_disk(daemon.client, name, None, daemon.pid, daemon.broker_pid))
    daemon.client.delete([name], force=True)


def _disk(client: AdminClient, name: str, pid: int | None, daemon_pid: int, broker_pid: int) -> Disk:
    status = client.wait_live(name, DEADLINE_S)
    assert status.path is not None
    workers = [each.pid for each in status.workers]
    backends = {} if pid is None else {"backend": [pid]}
    parts = {"worker": workers, **backends, "daemon": [daemon_pid, broker_pid]}
    return Disk(status.path, parts, name)


def _last_words(log: Path) -> str:
    said = log.read_text(errors="replace").split("\n") if log.exists() else []
    return " ".join([each for each in said if each][-2:]) or "its backend said nothing"


def transports(run_help: str) -> list[Transport]:
    """What `ublkpool backend --help` offers: nothing to choose from while there is one transport."""
    return ["zeromq", "ring"] if "--transport" in run_help else [""]
