"""A backend on an image of a test's cluster, with the daemon's half of its device."""

import stat
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from support.ceph.cluster import CLIENT, POOL, Cluster
from support.fakes.worker import FakeWorker, finish, spawn
from ublkpool.bufpool import wire


def options(cluster: Cluster, image: str, **more: str) -> dict[str, str]:
    """The backend's options for an image of the cluster."""
    return {"pool": POOL, "image": image, "conf": str(cluster.conf), "id": CLIENT, **more}


def let_workers_read(cluster: Cluster) -> None:
    """Let every user read the configuration and the keys: a worker connects as its own user."""
    for file in (cluster.conf, cluster.directory / "keyring"):
        file.chmod(0o644)
    for each in (cluster.directory, *cluster.directory.parents):
        mode = stat.S_IMODE(each.stat().st_mode)
        # The root of a guest is read-only.
        if mode & 0o011 != 0o011:
            each.chmod(mode | 0o011)


class Host:
    """A daemon's half of one device: what it has on record, and its backend's process."""

    def __init__(self, worker: FakeWorker, given: Mapping[str, str], prefix: Sequence[str] = ()) -> None:
        """`prefix` is put before the backend's command."""
        self.worker, self.given = worker, dict(given)
        self._prefix = prefix
        self.process: subprocess.Popen[str] | None = None
        self.owner = ""
        self.takes_over = False

    def start(self) -> "subprocess.Popen[str]":
        """Start a backend without waiting for its attach."""
        self.worker.described = {"former_owner": self.owner, "takes_over": self.takes_over}
        self.worker.described["knows_optimal_io"] = True
        self.process = spawn(self.worker.run_dir, "rbd", self.given, self._prefix)
        return self.process

    def serve(self) -> wire.Attach:
        """Start a backend and wait until it serves."""
        self.start()
        attach = self.worker.accept()
        self.owner, self.takes_over = attach.owner, False
        return attach

    def kill(self) -> None:
        """`kill -9` of the backend."""
        assert self.process is not None
        self.process.kill()
        finish(self.process)

    def stop(self) -> str:
        """Detach the backend; its log."""
        assert self.process is not None
        self.worker.detach()
        status, log = finish(self.process)
        assert status == 0, log
        return log


@contextmanager
def host(
    directory: Path, cluster: Cluster, image: str, prefix: Sequence[str] = (), **given: str
) -> Iterator[Host]:
    """A host for an image, without a backend at first; one that is left is killed at the end."""
    directory.mkdir(exist_ok=True)
    with FakeWorker(directory, depth=16) as worker:
        made = Host(worker, options(cluster, image, **given), prefix)
        try:
            yield made
        finally:
            if made.process is not None and made.process.poll() is None:
                made.process.kill()
                finish(made.process)


def said(worker: FakeWorker) -> wire.SessionMessage:
    """The backend's next message to the daemon."""
    assert worker.connection is not None
    return wire.decode_session_message(worker.connection.recv(wire.ATTACH_MESSAGE_BYTES_MAX))
