"""Who may have an image's lock: this process, after a predecessor whose process has ended, or on the operator's word.

A lock that is broken excludes its owner from the cluster, so that it writes no more.  So the lock of the owner on
record, whose process the daemon knows to be dead, is broken at once, and that of a predecessor that died before its
attach (`mark.py`), and no other: another client's is left to the cluster, which counts a client as dead when it has not
been heard for half a minute.
"""

import errno
import time
from collections.abc import Callable
from typing import Protocol

from ublkpool.backends.rbd.mark import MARK, ProcessMark
from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk.backend import Hint, log

LIVE_PATIENCE_S = 45.0
"""How long another owner is awaited; the cluster takes 30 s to notice a client's end."""
_PAUSE_S = 0.5
_MOVED = (errno.EBUSY, errno.EROFS, errno.ENOENT, errno.EAGAIN)
"""What librbd says if the lock's owner is another by now."""


def served_by(hint: Hint, owner: str) -> str:
    """What the image has on record of its clients: this one, and the one before on this machine."""
    return f"{owner} {hint.former_owner or ''}".strip()


def check_not_served_elsewhere(hint: Hint, on_record: str, name: str) -> None:
    """Raise `BackendError` if another machine has served the image while this device's disk was there.

    The lock may be free again by then.  The disk's clients know data from before, and their unanswered requests would
    be executed on top of what was written since.
    """
    has_disk, known = hint.node is not None, on_record.split()
    if not has_disk or hint.takes_next or not (hint.former_owner and known) or hint.former_owner in known:
        return
    raise BackendError(
        f"rbd: {name}: {known[0]} has served the image since this device's last backend, so that what the disk's "
        f"clients know of it may be outdated: ublkpool del --force {hint.device}, then add it again"
    )


class Lockable(Protocol):
    """An image, as far as its lock is concerned."""

    def lock_owners(self) -> list[str]:
        """The addresses of the clients that have its lock."""

    def watchers(self) -> list[str]:
        """The addresses of the clients that have it open."""

    @property
    def own_address(self) -> str:
        """The address of this client; empty if it is not known."""

    def metadata(self, key: str) -> str:
        """What is on record in the image under this key; empty: nothing."""

    def set_metadata(self, key: str, value: str) -> None:
        """Put something on record in the image."""

    def acquire_lock(self) -> None:
        """Take its lock and keep it.  Raises `OSError`."""

    def break_lock(self, owner: str) -> None:
        """Exclude this client and end its lock.  Raises `OSError`."""


class Claim:
    """The way to an image's lock."""

    def __init__(
        self,
        image: Lockable,
        name: str,
        hint: Hint,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`name` is the image's, for people; `clock` and `sleep` are in seconds."""
        self._image, self._name, self._hint = image, name, hint
        self._clock, self._sleep = clock, sleep
        self._since_s: float | None = None
        self._mark = ProcessMark.of_this(hint)
        self._is_marked = False

    def take(self) -> str:
        """Take the lock; returns the address under which this process has it.

        Raises `BackendError` that says who has it and how to take it over, `OSError`.
        """
        while not self._took():
            continue
        return self._image.lock_owners()[0]

    def check(self) -> None:
        """Raise `BackendError` if `take` would wait for another client: one look, which changes nothing."""
        owner = next(iter(self._image.lock_owners()), "")
        if owner and not self._may_break(owner) and owner in self._image.watchers():
            raise self._taken_by(owner)

    def _may_break(self, owner: str) -> bool:
        return self._hint.takes_over or self._is_predecessor(owner)

    def _taken_by(self, owner: str) -> BackendError:
        return BackendError(
            f"rbd: {self._name}: locked by {owner}, which this daemon does not know: end it there, or exclude it "
            f"and take the image over with: ublkpool add {self._hint.device} ... --take-over"
        )

    def _took(self) -> bool:
        """One step; whether the lock is this process's."""
        owner = next(iter(self._image.lock_owners()), "")
        if owner and self._is_predecessor(owner):
            self._break(owner, "the predecessor")
            return False
        if owner and self._hint.takes_over:
            self._break(owner, "another client")
            return False
        if owner in self._image.watchers():
            self._wait_for(owner)
            return False
        # Free, or its client is gone: then librbd breaks the lock itself, and excludes the client.
        self._leave_mark()
        return self._try(self._image.acquire_lock)

    def _is_predecessor(self, owner: str) -> bool:
        """Whether the owner is this device's last backend, whose process has ended."""
        if owner == self._hint.former_owner:
            return True
        return self._mark is not None and self._mark.follows(self._image.metadata(MARK), owner)

    def _leave_mark(self) -> None:
        """Once, and only when the lock is to be had: the mark on record is the lock's owner's."""
        if self._is_marked or self._mark is None:
            return
        if address := self._image.own_address:
            self._image.set_metadata(MARK, self._mark.text(address))
        self._is_marked = True

    def _break(self, owner: str, whose: str) -> None:
        log.warning("%s: taking over from %s, %s", self._name, whose, owner)
        self._try(lambda: self._image.break_lock(owner))

    def _try(self, step: Callable[[], None]) -> bool:
        try:
            step()
        except OSError as error:
            if error.errno not in _MOVED:
                raise
            self._wait_for("another client")
            return False
        return True

    def _wait_for(self, owner: str) -> None:
        now_s = self._clock()
        if self._since_s is None:
            self._since_s = now_s
            log.warning(
                "%s: locked by %s; waiting up to %g s for its end", self._name, owner, LIVE_PATIENCE_S
            )
        elif now_s - self._since_s >= LIVE_PATIENCE_S:
            raise self._taken_by(owner)
        self._sleep(_PAUSE_S)
