"""One connection to the server.

Owns a libnbd handle and its socket.  Knows no requests of the device: commands have cookies.  One thread at a time
uses a connection.
"""

import errno
import os
import select
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

from ublkpool.backends.nbd.library import ffi, last_error, library
from ublkpool.backends.nbd.options import NbdOptions
from ublkpool.bufpool.errors import BackendError

FUA, NO_HOLE = 1, 2
_READ, _WRITE = 1, 2
_TLS = {"off": 0, "allow": 1, "require": 2}
_MINIMUM, _MAXIMUM = 0, 2
_REQUEST_BYTES_MAX = 32 << 20
"""The largest request that every server takes without saying so (NBD protocol, "Block size constraints")."""
_LEAVE_S = 1.0
_SILENCE_S = 15
"""After how long without an answer to its probes a peer counts as lost: its machine is down or out of reach."""


class Export(NamedTuple):
    """What a server says of its export; sizes are bytes."""

    size_bytes: int
    block_bytes: int
    request_bytes_max: int
    read_only: bool
    flush: bool
    fua: bool
    trim: bool
    zero: bool
    multi_conn: bool
    rotational: bool


class Lost(Exception):
    """The connection cannot be made or has ended; the text says why."""


class Connection:
    """A connection that is being made, ready, or lost."""

    def __init__(self, options: NbdOptions) -> None:
        """Configures a handle.  Raises `BackendError` for an option that this library cannot serve."""
        self._library = library()
        self._handle: Any = self._library.nbd_create()
        self._silent = ffi.new("nbd_completion_callback *")[0]
        if self._handle == ffi.NULL:
            raise BackendError(f"nbd: {last_error()[1]}")
        try:
            self._configure(options)
        except BaseException:
            self.close()
            raise

    def _configure(self, options: NbdOptions) -> None:
        lib, handle = self._library, self._handle
        if options.uri and lib.nbd_supports_uri(handle) != 1:
            raise BackendError("nbd: this libnbd was built without URIs: give socket= or host=")
        if options.tls in ("allow", "require") and lib.nbd_supports_tls(handle) != 1:
            raise BackendError(f"nbd: this libnbd was built without TLS: tls={options.tls} cannot be served")
        # A read's buffer is memory that the kernel does not read unless the read succeeds.
        self._set(lib.nbd_set_pread_initialize(handle, False))
        self._set(lib.nbd_set_uri_allow_local_file(handle, True))
        if options.export:
            self._set(lib.nbd_set_export_name(handle, options.export.encode()))
        if options.tls != "auto":
            self._set(lib.nbd_set_tls(handle, _TLS[options.tls]))
        if options.tls_certificates is not None:
            self._set(lib.nbd_set_tls_certificates(handle, bytes(options.tls_certificates)))
        if options.tls_psk_file is not None:
            self._set(lib.nbd_set_tls_psk_file(handle, bytes(options.tls_psk_file)))
        if options.tls_username:
            self._set(lib.nbd_set_tls_username(handle, options.tls_username.encode()))
        self._set(lib.nbd_set_tls_verify_peer(handle, options.tls_verify_peer))

    def _set(self, result: int) -> None:
        if result < 0:
            raise BackendError(f"nbd: {last_error()[1]}")

    def connect(self, options: NbdOptions, within_s: float) -> None:
        """Connect and negotiate.  Raises `Lost` with the reason, also after `within_s` seconds."""
        deadline_s = time.monotonic() + within_s
        if self._start(options) < 0:
            raise Lost(last_error()[1])
        while not self.is_ready:
            if self.is_lost:
                raise Lost(last_error()[1] or "the connection ended")
            self._go_on_until(deadline_s, within_s)
        self._probe()

    def _start(self, options: NbdOptions) -> int:
        lib, handle = self._library, self._handle
        if options.uri:
            return int(lib.nbd_aio_connect_uri(handle, options.uri.encode()))
        if options.socket is not None:
            return int(lib.nbd_aio_connect_unix(handle, bytes(options.socket)))
        return int(lib.nbd_aio_connect_tcp(handle, options.host.encode(), str(options.port).encode()))

    def go_on(self, for_s: float = 0.0) -> bool:
        """Wait for the socket and let the library go on; returns False when the time is over, or the connection.

        The library must hear of no event that has not come: one that is told to read and finds nothing waits for an
        answer from then on, and sends no command (libnbd, state REPLY.START).
        """
        if self.is_lost:
            return False
        poller = select.poll()
        poller.register(self.fileno(), self.events)
        found = poller.poll(max(0, int(1000 * for_s)))
        for _, events in found:
            self._step(events)
        return bool(found)

    def _go_on_until(self, deadline_s: float, within_s: float) -> None:
        # A server that talks without end brings an event each time.
        left_s = deadline_s - time.monotonic()
        if not self.is_lost and (left_s <= 0 or not self.go_on(left_s)):
            raise Lost(f"no answer within {within_s:g} s")

    def _probe(self) -> None:
        """Let the kernel find out that the peer's machine is gone, which sends no end of the connection."""
        with socket.socket(fileno=os.dup(self.fileno())) as peer:
            if peer.family not in (socket.AF_INET, socket.AF_INET6):
                return
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in (
                (socket.TCP_KEEPIDLE, _SILENCE_S // 3),
                (socket.TCP_KEEPINTVL, _SILENCE_S // 3),
                (socket.TCP_KEEPCNT, 2),
                (socket.TCP_USER_TIMEOUT, 1000 * _SILENCE_S),
            ):
                peer.setsockopt(socket.IPPROTO_TCP, option, value)

    def export(self) -> Export:
        """What the server says of the export.  Raises `Lost`."""
        lib, handle = self._library, self._handle
        size_bytes = lib.nbd_get_size(handle)
        if size_bytes < 0:
            raise Lost(last_error()[1] or "the connection ended")

        def says(function: Any) -> bool:
            return bool(function(handle) == 1)

        return Export(
            size_bytes=size_bytes,
            block_bytes=max(1, lib.nbd_get_block_size(handle, _MINIMUM)),
            request_bytes_max=self._request_bytes_max(),
            read_only=says(lib.nbd_is_read_only),
            flush=says(lib.nbd_can_flush),
            fua=says(lib.nbd_can_fua),
            trim=says(lib.nbd_can_trim),
            zero=says(lib.nbd_can_zero),
            multi_conn=says(lib.nbd_can_multi_conn),
            rotational=says(lib.nbd_is_rotational),
        )

    def _request_bytes_max(self) -> int:
        announced = self._library.nbd_get_block_size(self._handle, _MAXIMUM)
        return int(min(announced, _REQUEST_BYTES_MAX)) if announced > 0 else _REQUEST_BYTES_MAX

    def fileno(self) -> int:
        """The socket, -1 without one; it may change while the connection is being made."""
        return int(self._library.nbd_aio_get_fd(self._handle))

    @property
    def events(self) -> int:
        """What the library waits for, as of `select.poll`."""
        direction = self._library.nbd_aio_get_direction(self._handle)
        return (select.POLLIN if direction & _READ else 0) | (select.POLLOUT if direction & _WRITE else 0)

    @property
    def is_ready(self) -> bool:
        """Whether commands can be sent."""
        lib, handle = self._library, self._handle
        return bool(lib.nbd_aio_is_ready(handle) == 1 or lib.nbd_aio_is_processing(handle) == 1)

    @property
    def is_lost(self) -> bool:
        """Whether the connection has ended."""
        lib, handle = self._library, self._handle
        return bool(lib.nbd_aio_is_dead(handle) == 1 or lib.nbd_aio_is_closed(handle) == 1)

    def _step(self, events: int) -> None:
        lib, handle = self._library, self._handle
        ended = select.POLLHUP | select.POLLERR
        direction = lib.nbd_aio_get_direction(handle)
        # A command in the making may be written only when the answer that is being read is complete.
        if events & (select.POLLIN | ended) and direction & _READ:
            lib.nbd_aio_notify_read(handle)
        elif events & (select.POLLOUT | ended) and direction & _WRITE:
            lib.nbd_aio_notify_write(handle)

    def read(self, offset: int, memory: memoryview) -> int:
        """Start a read into `memory`, which must stay until it has finished; returns its cookie.

        Raises `OSError` if the command is not accepted, `Lost` if the connection has ended; so do the next ones.
        """
        buffer = ffi.from_buffer(memory, require_writable=True)
        return self._started(
            self._library.nbd_aio_pread(self._handle, buffer, len(memory), offset, self._silent, 0)
        )

    def write(self, offset: int, memory: memoryview | bytes, flags: int = 0) -> int:
        """Start a write; see `read`."""
        buffer = ffi.from_buffer(memory)
        return self._started(
            self._library.nbd_aio_pwrite(self._handle, buffer, len(memory), offset, self._silent, flags)
        )

    def flush(self) -> int:
        """Start a FLUSH; see `read`."""
        return self._started(self._library.nbd_aio_flush(self._handle, self._silent, 0))

    def trim(self, offset: int, length: int) -> int:
        """Start a TRIM; see `read`."""
        return self._started(self._library.nbd_aio_trim(self._handle, length, offset, self._silent, 0))

    def zero(self, offset: int, length: int, flags: int = 0) -> int:
        """Start a WRITE_ZEROES; see `read`."""
        return self._started(self._library.nbd_aio_zero(self._handle, length, offset, self._silent, flags))

    def _started(self, cookie: int) -> int:
        if cookie < 0:
            number, text = last_error()
            if self.is_lost or number in (errno.ENOTCONN, errno.ESHUTDOWN):
                raise Lost(text)
            raise OSError(number or errno.EINVAL, text)
        return cookie

    def finished(self) -> Iterator[tuple[int, int]]:
        """The cookies of the commands that have finished, each with 0 or an errno."""
        lib, handle = self._library, self._handle
        while (cookie := lib.nbd_aio_peek_command_completed(handle)) > 0:
            done = lib.nbd_aio_command_completed(handle, cookie)
            yield int(cookie), 0 if done == 1 else (last_error()[0] or errno.EIO)

    def finish(self, cookie: int, within_s: float) -> None:
        """Wait for one command when none else is executing.  Raises `Lost`, `OSError`."""
        deadline_s = time.monotonic() + within_s
        while not self.is_lost:
            for each, error in self.finished():
                if each == cookie and error:
                    raise OSError(error, last_error()[1])
                if each == cookie:
                    return
            self._go_on_until(deadline_s, within_s)
        raise Lost("the connection ended")

    def leave(self) -> None:
        """Tell the server that no more commands follow, and close."""
        if self.is_ready:
            self._library.nbd_aio_disconnect(self._handle, 0)
            deadline_s = time.monotonic() + _LEAVE_S
            with suppress(Lost, OSError):
                while not self.is_lost:
                    self._go_on_until(deadline_s, _LEAVE_S)
        self.close()

    def close(self) -> None:
        """Close the socket; after this the library touches no buffer."""
        if self._handle != ffi.NULL:
            self._library.nbd_close(self._handle)
            self._handle = ffi.NULL
