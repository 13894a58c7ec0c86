"""Defects that a simulation can be played with, to show that it would find them.

Each name says what is wrong.  Some replace a function of the daemon's for a run (`REPLACED_BY`), others are looked at
by the part of the simulation that they are in.
"""

from collections.abc import Iterator
from typing import Any

from support.sim.wire import Part, QueueRouter, SimBackendLink
from ublkpool.bufpool.pool.control import Control
from ublkpool.bufpool.pool.lease import Owner
from ublkpool.bufpool.wire import DESCRIPTOR_BYTES, Descriptor, Flag, iter_frame, pack_frame
from ublkpool.daemon.backends.session import Session
from ublkpool.daemon.device import pool, recovery
from ublkpool.daemon.device.team import Team

NO_FENCE = "the backend is not fenced"
BUFFER_FREE_EARLY = "a buffer is free before its commit is consumed"
CUT_OFF_LIVES = "a backend that was cut off lives on"
COMPLETION_LOST = "a completion is lost"
LEASE_FORGOTTEN = "a new broker forgets a lease"
NO_REPLAY = "what a dead backend had is not sent again"
COMMANDS_LIVE_ON = "control commands outlive their supervisor"
END_COMES_LATE = "END_USER_RECOVERY comes after the fetches"
BELL_NOT_RUNG = "a worker does not ring for a backend that sleeps"
REGION_NOT_WANTED = "a backend in which requests wait for a region is not told of one"
DOZES_BLINDLY = "a worker sleeps without a last look at its ring"
PAUSES_COUNT = "the time of a pause counts"
END_IS_BLIND = "END_USER_RECOVERY waits for the fetches, and does not ask who has died since"
STATE_LOST = "a supervisor begins without the state of the one before it"

POOL_HANDED_ON = "a pool that a stranger has is handed to the next backend"

Replaced = tuple[Any, str, Any]


async def _no_fence(team: Team, session: Session | None) -> None:
    if session is not None and not session.is_gone:
        await team.expect(session, fence=False)


def _forgetful_owners(control: Control) -> Iterator[Owner | None]:
    found = list(_slot_owners(control))
    taken = [slot for slot, owner in enumerate(found) if owner is not None]
    for slot in taken[:1]:
        found[slot] = None
    return iter(found)


def _pass_on_without_replays(link: SimBackendLink, frame: bytes) -> bool:
    kept = [each for each in iter_frame(frame) if not each.flags & Flag.REPLAY]
    return _pass_on(link, pack_frame(kept)) if kept else True


def _receive_in_this_epoch(router: QueueRouter, flags: int, copy: bool) -> list[Part]:
    token, part = _receive(router, flags, copy)
    frame = part.bytes
    if not frame or len(frame) % DESCRIPTOR_BYTES:
        return [token, part]
    return [token, Part(b"".join(_made_new(router, each).pack() for each in iter_frame(frame)))]


def _made_new(router: QueueRouter, each: Descriptor) -> Descriptor:
    return each._replace(epoch=router.epoch)


_slot_owners = Control.slot_owners
_pass_on = SimBackendLink._pass_on
_receive = QueueRouter.recv_multipart
REPLACED_BY: dict[str, list[Replaced]] = {
    NO_FENCE: [(recovery, "_fence", _no_fence)],
    LEASE_FORGOTTEN: [(Control, "slot_owners", _forgetful_owners)],
    END_IS_BLIND: [(recovery, "_end_after_fetches", recovery._end_before_fetches)],
    POOL_HANDED_ON: [(pool, "is_open_elsewhere", lambda _fd: False)],
    NO_REPLAY: [(SimBackendLink, "_pass_on", _pass_on_without_replays)],
}
