"""The keeper: one small process that holds a memory disk's memfd while no backend does.

Owns the keeper's socket, its process and both ends of their protocol.  The keeper is this file run as a script, so that
it needs only the standard library and 10 MB: it answers `adopt` with the descriptor and ends on `drop`.  A process that
may open the socket (mode 0600) can get the memory.  The keeper runs detached, in its own session; under systemd the
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
    """The path of a device's keeper; the daemon sends `drop` to it when the device is deleted."""
    return run_dir / f"memory-{device}.keep"


class Keeper:
    """A backend's handle on the keeper at `path`, which may not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def _ask(self, question: bytes) -> list[int] | None:
        """The descriptors of the keeper's answer, None without a keeper.  Raises `BackendError` if it hangs."""
        # Here, since the keeper's own process runs this file without the package.
        from ublkpool.bufpool.errors import BackendError
        from ublkpool.bufpool.packets import receive_descriptors

        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(_ANSWER_TIMEOUT_S)
            try:
                connection.connect(str(self.path))
                connection.send(question)
                _, descriptors, _ = receive_descriptors(connection, 16, 1)
            except (FileNotFoundError, ConnectionError):
                # No keeper, or it has just ended.
                return None
            except TimeoutError as error:
                raise BackendError(
                    f"the keeper at {self.path} has not answered for {_ANSWER_TIMEOUT_S:g} s: "
                    "is it stopped? (fuser shows its process; killing it loses the disk)"
                ) from error
            except OSError as error:
                raise BackendError(f"cannot reach the keeper at {self.path}: {_reason(error)}") from error
            return descriptors

    def adopt(self) -> "OwnSegment | None":
        """The kept segment, None without a keeper.  Raises `BackendError` for one that cannot be asked."""
        from ublkpool.bufpool.errors import BackendError
        from ublkpool.bufpool.sdk.client import OwnSegment
        from ublkpool.bufpool.way_out import too_long_for_socket

        if reason := too_long_for_socket(self.path):
            raise BackendError(f"cannot keep memory: {reason}; keep=off does without")
        descriptors = self._ask(_ADOPT)
        return OwnSegment.adopt(descriptors[0]) if descriptors else None

    def keep(self, segment: "OwnSegment") -> None:
        """Start a keeper for a segment; its socket listens when this returns.  Raises `BackendError`."""
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
        """End the keeper, and with it the content.  Raises `BackendError` for one that cannot be asked."""
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
    # The end of the connection tells that the memory is gone, so it comes last.
    dropped_by.close()


def _serve_one(listener: socket.socket, memory_file: int) -> socket.socket | None:
    """Answer one question; returns the connection, still open, after a `drop`."""
    connection, _ = listener.accept()
    connection.settimeout(_ANSWER_TIMEOUT_S)
    try:
        question = connection.recv(16)
        if question == DROP:
            return connection
        socket.send_fds(connection, [question], [memory_file] if question == _ADOPT else [])
    except OSError:
        # The asking process has ended.
        pass
    connection.close()
    return None


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
