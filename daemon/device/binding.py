"""Which store a device belongs to: remembered from its first attach, compared at every later one.

Owns the rules of identity and of generations for one device's name; the files are `state.py`'s.  A store is accepted if
the device was never served, if it is the one that served the device before, or if the operator said `rebind`.  What was
accepted is on the disk before the backend hears of it.  Runs on the supervisor's asyncio loop, in the device's turn.
"""

import logging
from pathlib import Path

import msgspec

from ublkpool.bufpool import wire
from ublkpool.bufpool.errors import AttachRefused
from ublkpool.daemon.device.state import DeviceState, StateDirectory, Store
from ublkpool.daemon.errors import DaemonError

_OLDER_KINDS = ("file", "memory", "unknown", "")
"""Backends of older versions that told no identity; their successors of today must not make a store in its place."""
_log = logging.getLogger("ublkpool.device")


def boot_id() -> str:
    """What tells this boot of the machine from every other."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class Binding:
    """One device's store and generation."""

    def __init__(self, name: str, states: StateDirectory, boot: str) -> None:
        """`boot` is this boot's id."""
        self._name = name
        self._states = states
        self._boot = boot
        self._before: DeviceState | None = None

    @property
    def generation(self) -> int:
        """Of the last attach; 0 if there was none."""
        return self._states.generation(self._name)

    def may_create(self) -> bool:
        """Whether an empty store may be made: nothing is lost then.  Raises `DaemonError` if that is not known."""
        state = self._states.get(self._name)
        return (
            state.store is None
            or self._has_ended(state.store)
            or (state.takes_next and _is_volatile(state.store))
            or (_is_anonymous(state.store) and state.store.kind not in _OLDER_KINDS)
        )

    async def bind(self, attach: wire.Attach, size_bytes: int) -> int:
        """Take this store for the device, which has `size_bytes`; the attach's generation.

        Raises `AttachRefused` if it is another than the device's, `DaemonError` if the state cannot be kept.
        """
        state = self._states.get(self._name)
        if state.store is not None and not state.takes_next and not self._has_ended(state.store):
            self._check(state.store, attach)
        generation = max(state.generation, attach.generation_seen) + 1
        store = Store(
            kind=attach.kind,
            size_bytes=size_bytes,
            identity=attach.identity or wire.Identity(),
            boot=self._boot,
        )
        bound = DeviceState(name=self._name, generation=generation, store=store)
        await self._states.save(bound)
        if self._before is None:
            self._before = state
        if state.store is None and store.identity.strength == "weak":
            _log.info("%s: served from %s; another store may look the same", self._name, _words(store))
        if state.takes_next and state.store is not None:
            _log.info("%s: from now on served from %s", self._name, _words(store))
        return generation

    def served(self) -> None:
        """The device is live: its store has what clients wrote, and stays the device's."""
        self._before = None

    async def undo(self) -> None:
        """The device did not come to life: forget a store that was taken for it; a failure is logged."""
        before, self._before = self._before, None
        if before is not None:
            await self._try_to_save(msgspec.structs.replace(before, generation=self.generation))

    async def learn(self, served: wire.Attach | None, size_bytes: int, kind: str, generation: int) -> None:
        """What an earlier daemon served the device from, if nothing is known of it; a failure is logged.

        Its state directory may be lost, or that daemon kept none.
        """
        try:
            state = self._states.get(self._name)
        except DaemonError as error:
            _log.error("%s", error)
            return
        known = state.store or Store(
            kind=served.kind if served else kind,
            size_bytes=size_bytes,
            identity=(served.identity if served else None) or wire.Identity(),
            boot=self._boot,
        )
        learnt = msgspec.structs.replace(state, store=known, generation=max(generation, state.generation))
        if learnt != state:
            await self._try_to_save(learnt)

    async def rebind(self) -> None:
        """Have the next store that attaches become the device's.  Raises `DaemonError` if that cannot be kept."""
        try:
            state = self._states.get(self._name)
        except DaemonError:
            state = DeviceState(name=self._name, store=Store(kind="unknown", size_bytes=0))
        if state.store is not None:
            await self._states.save(msgspec.structs.replace(state, takes_next=True))
            _log.warning("%s: the next store that attaches becomes its own", self._name)

    async def forget(self) -> None:
        """The device was deleted on purpose; its name keeps the generation.  A failure is logged."""
        if self._states.knows(self._name):
            await self._try_to_save(DeviceState(name=self._name, generation=self.generation))

    async def end(self) -> None:
        """The device ends with its daemon, and some stores do so with their device.  A failure is logged."""
        store = self.store
        if store is not None and store.identity.ends_with_device:
            await self.forget()

    @property
    def store(self) -> Store | None:
        """What the device is bound to, as far as that can be read."""
        try:
            return self._states.get(self._name).store
        except DaemonError:
            return None

    def _has_ended(self, store: Store) -> bool:
        return _is_volatile(store) and store.boot != self._boot

    def _check(self, bound: Store, attach: wire.Attach) -> None:
        if _is_anonymous(bound):
            # An older version's backend, or one in another language that tells none: there is nothing to compare.
            return
        brought = attach.identity or wire.Identity()
        if not self._is_same(bound, brought):
            raise AttachRefused(
                f"device {self._name} is served from {_words(bound)}, this backend brings "
                f"{brought.store or 'a store without an identity'}: bring the first one back, or accept this one "
                f"with: ublkpool rebind {self._name}"
            )
        if 0 < attach.size_bytes < bound.size_bytes:
            raise AttachRefused(
                f"device {self._name} was served with {bound.size_bytes} bytes, {_words(bound)} has only "
                f"{attach.size_bytes} now: bring the rest back, or accept that with: ublkpool rebind {self._name}"
            )

    def _is_same(self, bound: Store, brought: wire.Identity) -> bool:
        if bound.identity.value != brought.value:
            return False
        if bound.boot != self._boot or not (bound.identity.in_boot and brought.in_boot):
            return not _is_volatile(bound)
        return bound.identity.in_boot == brought.in_boot

    async def _try_to_save(self, state: DeviceState) -> None:
        try:
            await self._states.save(state)
        except DaemonError as error:
            _log.error("%s: %s", self._name, error)


def _is_anonymous(store: Store) -> bool:
    """Whether its backend told no identity, so that no other store can be told from it."""
    return not store.identity.value and not store.identity.in_boot


def _is_volatile(store: Store) -> bool:
    """Whether it ends with the boot: it has an identity only until then."""
    return not store.identity.value and bool(store.identity.in_boot)


def _words(store: Store) -> str:
    """A store, for people."""
    return store.identity.store or f"a store of the backend {store.kind}"
