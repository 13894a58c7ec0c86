"""The short way for backends of methods: a frame of requests becomes calls, their results the frame of answers.

Knows the shape of a frame and the methods of a backend; no epochs but the one it is given, no regions, no state between
frames.  What it cannot do it leaves untouched for the `RequestEngine`, whole frames at a time.
"""

import errno
import struct
from collections.abc import Callable

from ublkpool.bufpool import wire
from ublkpool.bufpool.backend import Backend, Device, errno_of, op_name, perform_without_data
from ublkpool.bufpool.errors import WireError
from ublkpool.bufpool.wire import DESCRIPTOR_BYTES, Flag, Kind, Op

# op, flags; epoch; offset, length; segment, buffer
_FIELDS = struct.Struct("<xBH8xI8xQQ4xIQ8x")
_RESULT_AT = 40
_RESULT = struct.Struct("<iIQ")
assert _FIELDS.size == DESCRIPTOR_BYTES and _RESULT_AT + _RESULT.size == 56
_REQUEST, _READ, _WRITE = int(Kind.REQUEST), int(Op.READ), int(Op.WRITE)
_FUA, _REPLAY = int(Flag.FUA), int(Flag.REPLAY)
_DONE = int(Kind.DONE)
_DONES = bytes([_DONE]) * wire.DESCRIPTORS_PER_FRAME_MAX
_NOTHING = memoryview(b"")
_NO_FLAGS = bytes(wire.DESCRIPTORS_PER_FRAME_MAX)


def suits(backend: Backend) -> bool:
    """Whether a backend answers within its methods, and reads into buffers that it is given."""
    kind = type(backend)
    return kind.submit is Backend.submit and kind.read_in_place is Backend.read_in_place


class DirectCalls:
    """Calls a backend's methods for whole frames."""

    def __init__(self, backend: Backend, device: Device) -> None:
        """For a backend that `suits`."""
        self._backend = backend
        self._pread: Callable[[memoryview, int], int | None] = backend.pread
        self._pwrite: Callable[[memoryview, int, bool], int | None] = backend.pwrite
        self._pool, self._pool_bytes = device.pool, len(device.pool)
        self._clients = device.clients
        self.requests = self.failed = self.replayed = self.dropped = 0

    def answers_to(self, frame: bytes, epoch: int) -> bytearray | None:
        """Do what a frame asks for; the answers, in order, none to what is of an older epoch.

        None, and nothing is done, if it is not requests and nothing else.  Raises `WireError` for a buffer outside the
        pool.
        """
        count, rest = divmod(len(frame), DESCRIPTOR_BYTES)
        if rest or not 0 < count <= wire.DESCRIPTORS_PER_FRAME_MAX:
            return None
        if count == 1:
            return self._answer_to_one(frame, epoch)
        if frame[::DESCRIPTOR_BYTES].count(_REQUEST) != count:
            return None
        answers = bytearray(frame)
        old = self._call_all(frame, answers, epoch)
        answers[::DESCRIPTOR_BYTES] = _DONES[:count]
        answers[2::DESCRIPTOR_BYTES] = answers[3::DESCRIPTOR_BYTES] = _NO_FLAGS[:count]
        for at in reversed(old):
            del answers[at : at + DESCRIPTOR_BYTES]
        self.requests += count - len(old)
        self.dropped += len(old)
        return answers

    def _answer_to_one(self, frame: bytes, epoch: int) -> bytearray | None:
        """As `answers_to`, for what comes when nobody is in a hurry but for this one."""
        op, flags, of, offset, length, segment, buffer = _FIELDS.unpack(frame)
        if frame[0] != _REQUEST or of < epoch:
            return None
        answer = bytearray(frame)
        _RESULT.pack_into(answer, _RESULT_AT, self._call(op, flags, offset, length, segment, buffer), 0, 0)
        answer[0] = _DONE
        answer[2:4] = _NO_FLAGS[:2]
        self.requests += 1
        return answer

    def _call_all(self, frame: bytes, answers: bytearray, epoch: int) -> list[int]:
        """Call for each and put in its result; where those are that are too old to be done."""
        pack_result, call, old = _RESULT.pack_into, self._call, []
        at = _RESULT_AT
        for op, flags, of, offset, length, segment, buffer in _FIELDS.iter_unpack(frame):
            if of < epoch:
                old.append(at - _RESULT_AT)
            else:
                pack_result(answers, at, call(op, flags, offset, length, segment, buffer), 0, 0)
            at += DESCRIPTOR_BYTES
        return old

    def _call(self, op: int, flags: int, offset: int, length: int, segment: int, buffer: int) -> int:
        limit = length
        if flags & _REPLAY:
            self.replayed += 1
        try:
            if op == _READ:
                result = self._pread(self._memory(segment, buffer, length), offset)
            elif op == _WRITE:
                result = self._pwrite(self._memory(segment, buffer, length), offset, flags & _FUA != 0)
            else:
                limit = result = 0
                perform_without_data(self._backend, op, flags, offset, length)
        except WireError:
            raise
        except Exception as error:
            self.failed += 1
            return errno_of(error, f"{op_name(op)} at {offset}")
        if result is None:
            return limit
        if result > limit:
            result = errno_of(
                ValueError(f"{result} is more than was asked for"), f"{length} bytes at {offset}"
            )
        self.failed += result < 0
        return result

    def _memory(self, segment: int, buffer: int, length: int) -> memoryview:
        end = buffer + length
        if segment == wire.SEGMENT_POOL and end <= self._pool_bytes:
            return self._pool[buffer:end]
        if end <= len(memory := self._clients.get(segment, _NOTHING)):
            return memory[buffer:end]
        raise _no_buffer(segment, buffer, length)


def _no_buffer(segment: int, buffer: int, length: int) -> Exception:
    if segment == wire.SEGMENT_NONE:
        return OSError(errno.EOPNOTSUPP, "this backend does not read in place")
    return WireError(
        f"a worker named a buffer outside the pool: {length} bytes at {buffer} of segment {segment}"
    )
