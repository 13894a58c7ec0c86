"""The backend nbd: an export as a disk, over libnbd.

A write is answered when the server has answered it, so it survives this process.  A server that is lost is connected
to again; `session.py` says what is then sent again.
"""

import time
from collections.abc import Mapping, Sequence

from ublkpool.backends.nbd.connection import Connection, Export, Lost
from ublkpool.backends.nbd.connector import connect_all
from ublkpool.backends.nbd.options import NbdOptions, check_options
from ublkpool.backends.nbd.session import Session
from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk.backend import Backend, Device, Hint, Properties, Request, log
from ublkpool.bufpool.sizes import format_size
from ublkpool.bufpool.wire import Identity

_BLOCK_BYTES_MIN, _BLOCK_BYTES_MAX = 512, 4096
_PREDECESSOR_S, _PAUSE_S = 20.0, 0.1
_LENGTH_MAX = 1 << 30
"""Bytes of one DISCARD or WRITE_ZEROES; a command's length has 32 bits."""


class NbdBackend(Backend):
    """An export of an NBD server."""

    Options = NbdOptions

    def __init__(self, options: NbdOptions) -> None:
        """Raises `BackendError` for options that contradict each other."""
        check_options(options)
        self.options: NbdOptions = options
        self._connections: list[Connection] = []
        self._export: Export | None = None
        self._session: Session | None = None

    def open(self, hint: Hint) -> Properties:
        """Connect to the server, for a device that was served before within 20 s, and measure the export."""
        # A server that takes one client at a time refuses a successor until its predecessor's requests have ended.
        self._connections, export = self._connect(0.0 if hint.may_create else _PREDECESSOR_S)
        self._export = export
        try:
            return self._properties(export, hint)
        except BackendError:
            self.close()
            raise

    def _connect(self, within_s: float) -> tuple[list[Connection], Export]:
        deadline_s = time.monotonic() + within_s
        while True:
            try:
                return connect_all(self.options)
            except Lost as error:
                if time.monotonic() >= deadline_s:
                    raise BackendError(f"nbd: {self.options.server}: {error}") from error
            time.sleep(_PAUSE_S)

    def _properties(self, export: Export, hint: Hint) -> Properties:
        server, block_bytes = self.options.server, max(export.block_bytes, _BLOCK_BYTES_MIN)
        if block_bytes > _BLOCK_BYTES_MAX:
            raise BackendError(
                f"nbd: {server}: its smallest block of {block_bytes} bytes is larger than {_BLOCK_BYTES_MAX}; "
                "nbdkit --filter=blocksize makes it smaller"
            )
        if hint.size_bytes > export.size_bytes:
            raise BackendError(
                f"nbd: {server}: has {export.size_bytes} bytes, "
                f"fewer than device {hint.device} with {format_size(hint.size_bytes)} ({hint.size_bytes})"
            )
        size_bytes = hint.size_bytes or export.size_bytes
        if size_bytes < block_bytes:
            raise BackendError(f"nbd: {server}: has {export.size_bytes} bytes, not one block")
        if size_bytes < export.size_bytes:
            log.warning("%s: has %d bytes; the first %d are served", server, export.size_bytes, size_bytes)
        read_only = self.options.readonly or export.read_only
        length_max = 0 if read_only else min(_LENGTH_MAX, size_bytes)
        return Properties(
            size_bytes=size_bytes,
            logical_block_bytes=block_bytes,
            volatile_cache=export.flush and not read_only,
            read_only=read_only,
            rotational=export.rotational,
            discard_granularity_bytes=max(4096, block_bytes),
            discard_max_bytes=length_max if export.trim else 0,
            write_zeroes_max_bytes=length_max if export.zero else 0,
            identity=Identity(value=f"nbd:{server}", strength="weak", store=server),
        )

    def started(self, device: Device) -> None:
        """Hand the connections to the session."""
        assert self._export is not None
        count, asked = len(self._connections), self.options.connections
        if count < asked:
            log.warning("%s: one connection: the server does not offer several", self.options.server)
        log.info("%s: %d connections", self.options.server, count)
        self._session = Session(self.options, self._export, self._connections, device)
        self._connections = []

    def resize(self, size_bytes: int) -> None:
        """Serve more of an export that is larger than the device.

        Raises `BackendError` beyond that: a client learns an export's size only when it connects.
        """
        assert self._export is not None
        if size_bytes > self._export.size_bytes:
            raise BackendError(
                f"nbd: {self.options.server}: had {self._export.size_bytes} bytes when this backend connected: "
                "grow the export, restart the backend (requests wait meanwhile), then try again"
            )

    def submit(self, batch: Sequence[Request]) -> None:
        """Pass requests on to the server."""
        assert self._session is not None
        self._session.submit(batch)

    def statistics(self) -> Mapping[str, int]:
        """How often the server was lost, and what was sent again."""
        session = self._session
        if session is None:
            return {}
        return {
            "reconnects": session.reconnects,
            "replayed": session.replayed,
            "rewritten": session.rewritten,
            "unflushed_bytes": session.unflushed.kept_bytes,
        }

    def close(self) -> None:
        """Leave the server."""
        if self._session is not None:
            self._session.close()
            self._session = None
        for each in self._connections:
            each.leave()
        self._connections = []
