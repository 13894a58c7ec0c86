"""The device's requests, over the life of several connections and servers.

Owns the connections, the commands that are executing and those that wait, and the answered writes that no FLUSH has
covered yet.  Runs on the loop's thread; while the server is lost, `Connector` connects in a thread of its own.

    READY      commands go to the server
    DRAINING   a connection has ended: nothing is sent; the others' commands finish, or their connections end as well
    LOST       no connection; the connector tries
    REPLAYING  what the unflushed writes have left is written again, then the unanswered commands are sent, in order

An unanswered command may still be executing in a server that lives while the connection has ended; NBD has no fence
against that.  docs/BACKENDS.md says which servers give one.
"""

import errno
import os
import select
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from enum import Enum

from ublkpool.backends.nbd.connection import FUA, NO_HOLE, Connection, Export, Lost
from ublkpool.backends.nbd.connector import Connector
from ublkpool.backends.nbd.jobs import Command, Job
from ublkpool.backends.nbd.options import NbdOptions
from ublkpool.backends.nbd.unflushed import Kept, Unflushed
from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk.backend import Device, Request, log
from ublkpool.bufpool.sdk.ending import END_PATIENCE_S
from ublkpool.bufpool.wire import Op

_REPLAYS_MAX = 64


class State(Enum):
    """See the module."""

    READY = 0
    DRAINING = 1
    LOST = 2
    REPLAYING = 3


class Link:
    """A connection, its executing commands by cookie, and what the epoll knows of its socket."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.executing: dict[int, Command] = {}
        self.descriptor, self.events = -1, 0


class Session:
    """The requests of one device and their server."""

    def __init__(
        self, options: NbdOptions, export: Export, connections: Sequence[Connection], device: Device
    ) -> None:
        """Takes over the connections.  Raises `OSError` without a free descriptor."""
        self._options, self._export = options, export
        self._state = State.READY
        self._waiting: deque[Command] = deque()
        self._unanswered: list[Command] = []
        self._replays: deque[Command] = deque()
        self.unflushed = Unflushed(options.unflushed)
        self._flush_marks: dict[Command, int] = {}
        self._flush_error = 0
        self._own_flush: Command | None = None
        self._connector: Connector | None = None
        self._next_link = self._fruitless = 0
        self.reconnects = self.replayed = self.rewritten = 0
        self._broken: Exception | None = None
        self._epoll = select.epoll()
        # Made now: when the server is lost there may be no free descriptor.
        self._alarm = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._alarm, select.EPOLLIN)
        self._links: list[Link] = []
        device.watch(self._epoll.fileno(), self._turn)
        self._adopt(connections)

    def _adopt(self, connections: Sequence[Connection]) -> None:
        self._links = [Link(each) for each in connections]
        for link in self._links:
            self._attend(link)

    # Commands out.

    def submit(self, batch: Sequence[Request]) -> None:
        """Start these requests, or let them wait for the server."""
        for request in batch:
            self._waiting.extend(Job(request, self._export).commands(self._export))
        try:
            self._advance()
        except Exception as error:
            # An exception of `submit` would answer requests whose commands go on, with memory that is another's then.
            self._broken = error
            os.eventfd_write(self._alarm, 1)

    def _advance(self) -> None:
        """Do what the state allows, until only the server or the device can change something."""
        while True:
            before = self._state
            if self._state is State.READY:
                self._send_waiting()
            elif self._state is State.REPLAYING:
                self._replay()
            for link in self._links:
                self._settle(link)
            if self._state is State.DRAINING and not self._is_executing:
                self._lose()
            if self._state is before and not self._can_go_on:
                return

    @property
    def _is_executing(self) -> bool:
        return any(link.executing for link in self._links)

    @property
    def _can_go_on(self) -> bool:
        if self._state is State.READY:
            return bool(self._waiting) and not self._is_held(self._waiting[0])
        return self._state is State.REPLAYING and not self._is_executing

    def _send_waiting(self) -> None:
        while self._state is State.READY and self._waiting and not self._is_held(self._waiting[0]):
            self._start(self._waiting.popleft())
        if self._state is State.READY and self.unflushed.is_full and self._own_flush is None:
            self._own_flush = Command(None, Op.FLUSH, 0, 0, b"")
            self._start(self._own_flush)

    def _is_held(self, command: Command) -> bool:
        return command.writes and self.unflushed.is_over

    def _start(self, command: Command) -> None:
        if self._flush_error and command.job is not None and command.job.request.op == Op.FLUSH:
            error, self._flush_error = self._flush_error, 0
            command.job.finished(command, error)
            return
        link = self._links[self._next_link % len(self._links)]
        self._next_link += 1
        if command.op == Op.FLUSH:
            self._flush_marks[command] = self.unflushed.mark
        try:
            link.executing[_send(link.connection, command)] = command
        except Lost:
            self._unanswered.append(command)
            self._drain()
        except OSError as error:
            self._finished(command, error.errno or errno.EIO)

    # Events and answers.

    def _turn(self) -> None:
        """The epoll is readable: let the library work, then do what became possible.

        Raises `BackendError` if that fails: the process ends, and its requests wait for the successor.
        """
        try:
            self._hear()
            self._advance()
        except BackendError:
            raise
        except Exception as error:
            raise BackendError(f"nbd: {self._options.server}: cannot go on: {error!r}") from error

    def _hear(self) -> None:
        # An event may be of an earlier socket with the same number: a process that was being forked had a copy.
        for descriptor, _ in self._epoll.poll(0):
            if descriptor == self._alarm:
                self._alarmed()
            for link in self._links:
                if link.descriptor == descriptor:
                    link.connection.go_on()

    def _alarmed(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._alarm)
        if self._broken is not None:
            raise self._broken
        if self._connector is not None and self._connector.has_ended:
            self._return(self._connector)

    def _settle(self, link: Link) -> None:
        """Take the finished commands of a connection, notice its end, and wait for what it waits for."""
        connection = link.connection
        for cookie, error in connection.finished():
            command = link.executing.pop(cookie)
            # An end of the connection, or of the server, is no answer.
            if error == errno.ESHUTDOWN or (error and connection.is_lost):
                self._unanswered.append(command)
                self._drain()
            else:
                self._finished(command, error)
        if connection.is_lost:
            self._unanswered += link.executing.values()
            link.executing.clear()
            self._drain()
        self._attend(link)

    def _attend(self, link: Link) -> None:
        """Keep the epoll's registration as the library wants it; a socket that is closed leaves it by itself."""
        lost = link.connection.is_lost
        descriptor, events = (-1, 0) if lost else (link.connection.fileno(), link.connection.events)
        if (descriptor, events) == (link.descriptor, link.events):
            return
        if link.descriptor >= 0 and descriptor != link.descriptor:
            with suppress(OSError):
                self._epoll.unregister(link.descriptor)
        if descriptor >= 0 and descriptor == link.descriptor:
            self._epoll.modify(descriptor, events)
        elif descriptor >= 0:
            self._epoll.register(descriptor, events)
        link.descriptor, link.events = descriptor, events

    def _finished(self, command: Command, error: int) -> None:
        """The server has answered, or the library has refused the command."""
        self._fruitless = 0
        if command.op == Op.FLUSH:
            self._flush_finished(command, error)
        elif command.job is None:
            self._rewritten(command, error)
        elif command.writes and not error and self._export.flush:
            self._keep(command)
        if command.job is not None:
            self._waiting.extendleft(reversed(command.job.finished(command, error)))

    def _keep(self, command: Command) -> None:
        if command.flags & FUA and not self.unflushed.bytes_max:
            return
        data = command.data
        kept = None if data is None else memoryview(data)
        self.unflushed.add(command.offset, command.length, kept, bool(command.flags & NO_HOLE))

    def _flush_finished(self, command: Command, error: int) -> None:
        mark = self._flush_marks.pop(command)
        if not error:
            self.unflushed.flushed(mark)
        if command is self._own_flush:
            self._own_flush = None
            if error:
                # The device did not ask for this FLUSH; its next one tells it.
                log.error("%s: a FLUSH failed: %s", self._options.server, os.strerror(error))
                self._flush_error = error
                self.unflushed.forget()

    # The loss of the server, and its return.

    def _drain(self) -> None:
        if self._state in (State.READY, State.REPLAYING):
            self._state = State.DRAINING
            log.warning("%s: the connection has ended, connecting again", self._options.server)

    def _lose(self) -> None:
        """Every connection is idle or has ended: close them all and look for the server."""
        for link in self._links:
            link.connection.close()
        self._links = []
        # Those that waited have higher numbers than those that were sent.
        unanswered = [each for each in self._unanswered if each.job is not None]
        self._unanswered = []
        self._own_flush = None
        self._replays.clear()
        self._flush_marks.clear()
        self.replayed += len(unanswered)
        self._waiting = deque(sorted([*unanswered, *self._waiting], key=lambda each: each.number))
        self._tell_of_loss()
        self._connector = Connector(self._options, self._export, self._alarm, self._fruitless)
        self._fruitless += 1
        self._state = State.LOST

    def _tell_of_loss(self) -> None:
        """Without copies the next FLUSH must fail: the server may have lost what it was told to keep."""
        if len(self.unflushed) and not self.unflushed.bytes_max:
            log.error(
                "%s: %d answered writes were not flushed, and unflushed=0 keeps none: the next FLUSH fails",
                self._options.server,
                len(self.unflushed),
            )
            self._flush_error = errno.EIO
            self.unflushed.forget()

    def _return(self, connector: Connector) -> None:
        """The connector has ended: go on with its connections.  Raises `BackendError` if the server stays away."""
        self._connector = None
        try:
            self._adopt(connector.take())
        except BackendError:
            self._tell_of_lost_copies()
            raise
        self.reconnects += 1
        self._replays = deque(_again(each) for each in self.unflushed.newest())
        self._state = State.REPLAYING
        log.info(
            "%s: connected again; %d unflushed writes and %d commands are sent again",
            self._options.server,
            len(self._replays),
            len(self._waiting),
        )

    def _replay(self) -> None:
        """Write the unflushed writes again, a bounded number at a time; they do not overlap."""
        executing = sum(len(link.executing) for link in self._links)
        while self._state is State.REPLAYING and self._replays and executing < _REPLAYS_MAX:
            executing += 1
            self._start(self._replays.popleft())
        if self._state is State.REPLAYING and not self._replays and not self._is_executing:
            self._state = State.READY

    def _rewritten(self, command: Command, error: int) -> None:
        self.rewritten += 1
        if error:
            log.error(
                "%s: an answered write at %d could not be written again (%s): the next FLUSH fails",
                self._options.server,
                command.offset,
                os.strerror(error),
            )
            self._flush_error = error

    def _tell_of_lost_copies(self) -> None:
        if len(self.unflushed):
            log.error(
                "%s: %d answered writes were not flushed; if the server has died they are lost",
                self._options.server,
                len(self.unflushed),
            )

    def close(self) -> None:
        """Flush what the server may still lose, and leave it.  The loop has ended, and with it the watch."""
        deadline_s = time.monotonic() + END_PATIENCE_S
        self._end_replay(deadline_s)
        self._epoll.close()
        # A thread that hangs may still write to the eventfd.
        if self._connector is None or self._connector.stop():
            os.close(self._alarm)
        if self._state is State.READY and self._export.flush and len(self.unflushed):
            connection = self._links[0].connection
            try:
                connection.finish(connection.flush(), max(0.0, deadline_s - time.monotonic()))
                self.unflushed.forget()
            except (Lost, OSError) as error:
                log.error("%s: the last FLUSH failed: %s", self._options.server, error)
        self._tell_of_lost_copies()
        for link in self._links:
            link.connection.leave()

    def _end_replay(self, deadline_s: float) -> None:
        """Wait for a lost server, and until it has all copies again: a FLUSH would not cover the missing ones."""
        with suppress(BackendError):
            while self._state is not State.READY and len(self.unflushed) and self._is_alone:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0 or not self._epoll.poll(left_s):
                    return
                self._turn()

    @property
    def _is_alone(self) -> bool:
        """Whether no request of the device is left, and something can still change."""
        executing = [each for link in self._links for each in link.executing.values()]
        theirs = [each for each in (*executing, *self._unanswered, *self._waiting) if each.job is not None]
        return not theirs and (self._connector is not None or bool(self._links))


def _send(connection: Connection, command: Command) -> int:
    """Hand a command to the library; returns its cookie.  Raises as `Connection.read`."""
    op, offset, memory = command.op, command.offset, command.memory
    if op == Op.READ:
        assert isinstance(memory, memoryview)
        return connection.read(offset, memory)
    if op == Op.WRITE:
        return connection.write(offset, memory, command.flags & FUA)
    if op == Op.FLUSH:
        return connection.flush()
    if op == Op.DISCARD:
        return connection.trim(offset, command.length)
    return connection.zero(offset, command.length, command.flags)


def _again(kept: Kept) -> Command:
    """The command that writes a kept write again."""
    if kept.data is not None:
        return Command(None, Op.WRITE, kept.offset, kept.length, kept.data)
    return Command(None, Op.WRITE_ZEROES, kept.offset, kept.length, b"", NO_HOLE if kept.no_hole else 0)
