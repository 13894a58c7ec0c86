"""Keeps a backend's memory alive while the backend is not: one small process that holds the memfd and hands it out.

Owns the keeper's socket, its process and both ends of what they say.  The keeper is this file run as a script (so it
needs nothing but the standard library and 10 MB): it answers `adopt` with the descriptor and ends on `drop`.  Anyone
who may open the socket (mode 0600) may have the memory.  It runs detached, in its own session; under systemd the
backend's unit needs `KillMode=process` to leave it alive.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ublkpool.bufpool.sdk.client import OwnSegment

_ADOPT = b"adopt"
DROP = b"drop"
_ANSWER_TIMEOUT_S = 10.0


def keeper_path(run_dir: Path, device: str) -> Path:
    """Where a device's memory is kept; the daemon drops what is there when the device is deleted."""
    return run_dir / f"memory-{device}.keep"


class Keeper:
    """A backend's handle on the keeper behind `path`, which need not be there yet."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def _ask(self, question: bytes) -> list[int] | None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(_ANSWER_TIMEOUT_S)
            try:
                connection.connect(str(self.path))
                connection.send(question)
                _, descriptors, _, _ = socket.recv_fds(connection, 16, 1, socket.MSG_CMSG_CLOEXEC)
            except (FileNotFoundError, ConnectionError):
                # There is no keeper, or it has ended since.
                return None
            return descriptors

    def adopt(self) -> "OwnSegment | None":
        """The segment that is kept, None if none is.  Raises `BackendError` for a path that no socket can have."""
        from ublkpool.bufpool.errors import BackendError
        from ublkpool.bufpool.sdk.client import OwnSegment
        from ublkpool.bufpool.way_out import too_long_for_socket

        if reason := too_long_for_socket(self.path):
            raise BackendError(f"cannot keep memory: {reason}; keep=off does without")
        descriptors = self._ask(_ADOPT)
        return OwnSegment.adopt(descriptors[0]) if descriptors else None

    def keep(self, segment: "OwnSegment") -> None:
        """Start a keeper for a segment; the socket listens when this returns."""
        from ublkpool.bufpool.errors import BackendError

        try:
            with _listen(self.path) as listener:
                files = (listener.fileno(), segment.descriptor)
                subprocess.run(
                    [sys.executable, "-I", "-S", __file__, *map(str, files), str(self.path)],
                    pass_fds=files,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    check=True,
                )
        except (OSError, subprocess.SubprocessError) as error:
            raise BackendError(
                f"cannot keep memory at {self.path}: {_reason(error)}; keep=off does without"
            ) from error

    def drop(self) -> None:
        """End the keeper, and with it what it kept."""
        self._ask(DROP)


def _reason(error: Exception) -> str:
    from ublkpool.bufpool.way_out import explain

    return explain(error) if isinstance(error, OSError) else str(error)


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    path.unlink(missing_ok=True)
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(mask)
    listener.listen()
    return listener


def _main(listener_file: int, memory_file: int, path: str) -> None:
    if os.fork():
        os._exit(0)
    os.setsid()
    os.chdir("/")
    with socket.socket(fileno=listener_file) as listener:
        while (dropped_by := _serve_one(listener, memory_file)) is None:
            pass
        Path(path).unlink(missing_ok=True)
    # The end of the connection says that the memory is gone, so it comes last.
    dropped_by.close()


def _serve_one(listener: socket.socket, memory_file: int) -> socket.socket | None:
    """Answers one question; the connection, still open, if that was `drop`."""
    connection, _ = listener.accept()
    connection.settimeout(_ANSWER_TIMEOUT_S)
    try:
        question = connection.recv(16)
        if question == DROP:
            return connection
        socket.send_fds(connection, [question], [memory_file] if question == _ADOPT else [])
    except OSError:
        # It asked and went away.
        pass
    connection.close()
    return None


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
