"""Starts ublkpool's own contestants: a device of the one daemon, and a backend process for each."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal

from bench.cells import REGION_BYTES
from bench.results import Transport
from bench.stage import DEADLINE_S, Disk, Disks, Stage, last_words, process
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
        # Unlike in the tests, each backend names its transport.
        daemon.add(name, **{"rings": True, "queues": QUEUES, "placement": placement, **config})
        log = stage.directory / f"{name}.log"
        try:
            with process(command, log, daemon.environment()) as pid:
                yield Disks(_disk(stage, name, [pid], log))
                daemon.client.delete([name], force=True)
        except DaemonError as error:
            raise DaemonError(f"{error}; {last_words(log)}") from error

    return start


@contextmanager
def alone(stage: Stage, name: str) -> Iterator[Disks]:
    """A device whose workers answer requests without a backend."""
    daemon = stage.daemon
    daemon.add(name, answers="worker", queues=QUEUES, size_bytes=REGION_BYTES)
    yield Disks(_disk(stage, name, []))
    daemon.client.delete([name], force=True)


def inside(
    kind: str,
    placement: Literal["pool", "backend"] = "pool",
    file: str = "",
    options: Mapping[str, object] | None = None,
    queues: int = QUEUES,
    **config: Any,
) -> Start:
    """A device whose workers run this engine themselves; `file` as in `backend`."""

    @contextmanager
    def start(stage: Stage, name: str) -> Iterator[Disks]:
        given = dict(options if options is not None else {"size": REGION_BYTES})
        if file:
            given = {file: stage.make_file(f"{name}.img")}
        stage.daemon.add(name, kind, given, queues=queues, placement=placement, isolation="none", **config)
        yield Disks(_disk(stage, name, []))
        stage.daemon.client.delete([name], force=True)

    return start


def _disk(stage: Stage, name: str, backends: list[int], log: Path | None = None) -> Disk:
    daemon = stage.daemon
    status = daemon.client.wait_live(name, DEADLINE_S)
    assert status.path is not None
    workers = [each.pid for each in status.workers]
    parts = {"worker": workers, "backend": backends, "daemon": [daemon.pid, daemon.broker_pid]}
    return Disk(status.path, {part: pids for part, pids in parts.items() if pids}, name, log)


def transports(run_help: str) -> list[Transport]:
    """The transports that `ublkpool backend --help` offers; empty for a version without the option."""
    return ["zeromq", "ring"] if "--transport" in run_help else [""]
