"""The life of a tag, as data: which state follows which on what.  Pure.

The table is the specification; `ublk/csrc/queue_tag.c` runs it, and `tests/unit/test_tag_state.py` compares the two
entry by entry.  The numbers are those of the C enums.

    KERNEL --request--> WAIT_BUFFER --> COPYING --> WAIT_LINK --> SERVING --> COMMITTING --> KERNEL
                        WAIT_PLACE --> PLACING --^      (the whole road of a write that asks for its data)

On a device with limits a request is in WAIT_LIMIT first, and leaves it as it would have left KERNEL.
"""

import enum


class State(enum.IntEnum):
    """Who holds the tag."""

    KERNEL = 0
    """Fetched: the kernel may complete it with a request."""
    WAIT_BUFFER = 1
    """It needs a pool buffer and there is none yet."""
    WAIT_PLACE = 2
    """A write that no backend has been asked to place."""
    PLACING = 3
    """The backend was asked for a region."""
    COPYING = 4
    """NEED_GET_DATA was sent: the kernel copies into the buffer."""
    WAIT_LINK = 5
    """Ready for a backend, and there is none."""
    SERVING = 6
    """The backend has it."""
    FAILING = 7
    """The kernel copies into scratch: a write that waits for its data can only then be committed with its error."""
    COMMITTING = 8
    """The commit is written and not yet consumed: its buffer is still lent."""
    GONE = 9
    """The kernel took it away: the device stops."""
    WAIT_LIMIT = 10
    """It waits until the device's limits let it pass."""


class Event(enum.IntEnum):
    """What happens to it."""

    NEEDS_BUFFER = 0
    NEEDS_PLACE = 1
    READY = 2
    BUFFER_TO_COPY = 3
    BUFFER_TO_SERVE = 4
    ASK = 5
    PLACED = 6
    FAIL_UNCOPIED = 7
    COPIED = 8
    RESCUE = 9
    """Its data lies in a dead backend's segment and must move to the pool."""
    REQUEUED = 10
    """The driver could copy nothing and sends the write again; the tag may carry another request by then."""
    HAND_OVER = 11
    LINK_LOST = 12
    FINISH = 13
    TAKEN = 14
    """io_uring_enter has consumed the commit."""
    ABORTED = 15
    POSTED = 16
    """The backend has posted a region that it fits in: nobody is asked."""
    THROW_AWAY = 17
    """The worker answers itself: the write is copied into scratch and forgotten."""
    IN_PLACE = 18
    """A write whose data lies in the client area: the kernel wants its NEED_GET_DATA and copies nothing."""
    LIMITED = 19
    """The device has limits, and each request but FLUSH waits its turn, perhaps for no time."""


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.KERNEL, Event.NEEDS_BUFFER): State.WAIT_BUFFER,
    (State.KERNEL, Event.NEEDS_PLACE): State.WAIT_PLACE,
    (State.KERNEL, Event.READY): State.WAIT_LINK,
    (State.KERNEL, Event.THROW_AWAY): State.COPYING,
    (State.KERNEL, Event.IN_PLACE): State.COPYING,
    (State.KERNEL, Event.FAIL_UNCOPIED): State.FAILING,
    (State.KERNEL, Event.FINISH): State.COMMITTING,
    (State.KERNEL, Event.ABORTED): State.GONE,
    (State.KERNEL, Event.LIMITED): State.WAIT_LIMIT,
    (State.WAIT_LIMIT, Event.NEEDS_BUFFER): State.WAIT_BUFFER,
    (State.WAIT_LIMIT, Event.NEEDS_PLACE): State.WAIT_PLACE,
    (State.WAIT_LIMIT, Event.READY): State.WAIT_LINK,
    (State.WAIT_LIMIT, Event.THROW_AWAY): State.COPYING,
    (State.WAIT_LIMIT, Event.IN_PLACE): State.COPYING,
    (State.WAIT_LIMIT, Event.FAIL_UNCOPIED): State.FAILING,
    (State.WAIT_LIMIT, Event.FINISH): State.COMMITTING,
    (State.WAIT_BUFFER, Event.BUFFER_TO_COPY): State.COPYING,
    (State.WAIT_BUFFER, Event.BUFFER_TO_SERVE): State.WAIT_LINK,
    (State.WAIT_BUFFER, Event.FAIL_UNCOPIED): State.FAILING,
    (State.WAIT_BUFFER, Event.FINISH): State.COMMITTING,
    (State.WAIT_PLACE, Event.ASK): State.PLACING,
    (State.WAIT_PLACE, Event.POSTED): State.COPYING,
    (State.WAIT_PLACE, Event.FAIL_UNCOPIED): State.FAILING,
    (State.PLACING, Event.PLACED): State.COPYING,
    (State.PLACING, Event.LINK_LOST): State.WAIT_PLACE,
    (State.PLACING, Event.FAIL_UNCOPIED): State.FAILING,
    (State.COPYING, Event.COPIED): State.WAIT_LINK,
    (State.COPYING, Event.RESCUE): State.WAIT_BUFFER,
    (State.COPYING, Event.REQUEUED): State.KERNEL,
    (State.COPYING, Event.FINISH): State.COMMITTING,
    (State.COPYING, Event.ABORTED): State.GONE,
    (State.WAIT_LINK, Event.HAND_OVER): State.SERVING,
    (State.WAIT_LINK, Event.NEEDS_BUFFER): State.WAIT_BUFFER,
    (State.WAIT_LINK, Event.RESCUE): State.WAIT_BUFFER,
    (State.WAIT_LINK, Event.FINISH): State.COMMITTING,
    (State.SERVING, Event.LINK_LOST): State.WAIT_LINK,
    (State.SERVING, Event.RESCUE): State.WAIT_BUFFER,
    (State.SERVING, Event.FINISH): State.COMMITTING,
    (State.FAILING, Event.REQUEUED): State.KERNEL,
    (State.FAILING, Event.FINISH): State.COMMITTING,
    (State.FAILING, Event.ABORTED): State.GONE,
    (State.COMMITTING, Event.TAKEN): State.KERNEL,
}
"""Everything else is a fault of ours: the core stops the worker rather than guess."""
