"""A real nbdkit server that a test starts, stops, kills and starts again at the same place."""

import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from support.sources.ports import HeldPort
from support.stopping import stop

_DEADLINE_S = 60.0


class Nbdkit:
    """One nbdkit at a unix socket, or at a port of the loopback; a context manager."""

    def __init__(
        self,
        plugin: Sequence[str | Path],
        *,
        socket_path: Path | None = None,
        filters: Iterable[str] = (),
        arguments: Sequence[str | Path] = (),
    ) -> None:
        """`plugin`: its name and parameters, those of the filters too."""
        self.plugin, self.filters, self.arguments = list(plugin), list(filters), list(arguments)
        self.socket_path = socket_path
        self._held = None if socket_path else HeldPort()
        self.port = self._held.number if self._held is not None else 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def options(self) -> dict[str, str]:
        """The options that lead the backend nbd here."""
        if self.socket_path is not None:
            return {"socket": str(self.socket_path)}
        return {"host": "127.0.0.1", "port": str(self.port)}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        if self._held is not None:
            self._held.close()

    def start(self) -> None:
        """Start, and wait until it accepts connections."""
        if self.socket_path is not None:
            self.socket_path.unlink(missing_ok=True)
            place = ["--unix", str(self.socket_path)]
        else:
            place = ["--ipaddr", "127.0.0.1", "--port", str(self.port)]
        command = ["nbdkit", "--foreground", *place, *(f"--filter={each}" for each in self.filters)]
        self._process = subprocess.Popen([*command, *self.arguments, *self.plugin])
        deadline_s = time.monotonic() + _DEADLINE_S
        while not self._accepts():
            assert self._process.poll() is None, "nbdkit ended at once"
            assert time.monotonic() < deadline_s, "nbdkit does not listen"
            time.sleep(0.01)

    def _accepts(self) -> bool:
        family = socket.AF_UNIX if self.socket_path else socket.AF_INET
        with socket.socket(family) as probe:
            try:
                probe.connect(str(self.socket_path) if self.socket_path else ("127.0.0.1", self.port))
                return True
            except OSError:
                return False

    def stop(self) -> None:
        """Let it answer nothing more."""
        assert self._process is not None
        stop(self._process.pid)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """`kill -9`, also of a stopped one."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        """`kill -9`, and start again at the same place."""
        self.kill()
        self.start()
