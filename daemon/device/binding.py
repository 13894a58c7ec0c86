"""The store that a device is bound to: remembered from the first attach, compared at every later one.

Owns the rules of identity and of generations for one device name; the files are `state.py`'s.  A store is accepted if
the device was never served, if the same store served it before, or if the operator said `rebind`.  The state is durable
before the backend hears of the acceptance.  Runs on the supervisor's asyncio loop, in the device's turn.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import msgspec

from ublkpool.bufpool import wire
from ublkpool.bufpool.errors import AttachRefused
from ublkpool.bufpool.wire.same_store import is_same_store
from ublkpool.daemon.device.state import DeviceState, StateDirectory, Store
from ublkpool.daemon.errors import DaemonError

UNKNOWN_KIND = "unknown"
GENERATION_JUMP_MAX = 1 << 32
"""How far a store may be ahead of the state directory, which can be lost: a lie must not use up the numbers."""
_ANY_KIND = (UNKNOWN_KIND, "")
"""Of a store about which only its existence is known; it cannot be compared."""
_log = logging.getLogger("ublkpool.device")


def boot_id() -> str:
    """Identifies this boot of the machine.  Raises `OSError`."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class Binding:
    """One device's store and generation."""

    def __init__(self, name: str, states: StateDirectory, boot: str) -> None:
        """`boot` is this boot's id."""
        self._name = name
        self._states = states
        self._boot = boot
        self._before: DeviceState | None = None
        self._is_starting = False

    @property
    def generation(self) -> int:
        """The generation of the last attach, also from a damaged file that shows one; 0 if none is known."""
        return self._states.generation(self._name)

    def may_create(self) -> bool:
        """Whether an empty store loses no data.  Raises `DaemonError` if the name's state cannot be read."""
        state = self._states.get(self._name)
        return (
            state.store is None
            or self._has_ended(state.store)
            or (state.takes_next and _is_volatile(state.store))
        )

    def takes_next(self) -> bool:
        """Whether the operator accepted the next store, whatever it is.  Raises `DaemonError` as `may_create`."""
        return self._states.get(self._name).takes_next

    @property
    def owner(self) -> str:
        """The owner of the store's lock at the last attach; empty: none is known."""
        try:
            return self._states.get(self._name).owner
        except DaemonError:
            return ""

    def takes_over(self) -> bool:
        """Whether the next backend breaks its store's lock.  Raises `DaemonError` as `may_create`."""
        return self._states.get(self._name).takes_over

    @property
    def resized_bytes(self) -> int:
        """The size that the device was given while it was live, also for the store that `rebind` accepts; 0: none."""
        try:
            state = self._states.get(self._name)
        except DaemonError:
            return 0
        store = state.store
        return 0 if store is None or self._has_ended(store) else store.resized_bytes

    def resized_for(self, attach: wire.Attach) -> int:
        """The same for this backend: the operator may have accepted a store with less (`rebind`)."""
        resized_bytes = self.resized_bytes
        if resized_bytes and attach.size_bytes and self.takes_next():
            return min(resized_bytes, attach.size_bytes)
        return resized_bytes

    async def resize(self, size_bytes: int) -> None:
        """From now on the device has this size, also if the daemon is killed.

        Raises `DaemonError` if that cannot be written: the size is the old one then.
        """
        async with self._states.turn(self._name):
            state = self._states.get(self._name)
            if state.store is None:
                raise DaemonError(f"{self._name}: no store is on record")
            store = msgspec.structs.replace(state.store, size_bytes=size_bytes, resized_bytes=size_bytes)
            await self._states.save(msgspec.structs.replace(state, store=store))

    async def bind(self, attach: wire.Attach, size_bytes: int, resized_bytes: int = 0) -> int:
        """Bind this store to the device, which has `size_bytes`; the attach's generation.

        `resized_bytes`: see `Store`.

        Raises `AttachRefused` if the device is bound to another store, `DaemonError` if the state cannot be written.
        """
        async with self._states.turn(self._name):
            state = self._states.get(self._name)
            if state.store is not None and not state.takes_next and not self._has_ended(state.store):
                self._check(state.store, attach)
            if attach.generation_seen > state.generation + GENERATION_JUMP_MAX:
                raise AttachRefused(
                    f"device {self._name}: generation_seen {attach.generation_seen} was never given: the last "
                    f"generation was {state.generation}"
                )
            generation = max(state.generation, attach.generation_seen) + 1
            store = Store(
                kind=attach.kind,
                size_bytes=size_bytes,
                identity=attach.identity or wire.Identity(),
                boot=self._boot,
                resized_bytes=resized_bytes,
            )
            bound = DeviceState(name=self._name, generation=generation, store=store, owner=attach.owner)
            await self._states.save(bound)
            if self._before is None:
                self._before = state
            if state.store is None and store.identity.strength == "weak":
                _log.info("%s: served from %s; another store may look the same", self._name, _words(store))
            if state.takes_next and state.store is not None:
                _log.info("%s: from now on served from %s", self._name, _words(store))
            return generation

    async def locked_as(self, owner: str) -> None:
        """The store is locked under this name, also if the daemon is killed.

        Raises `DaemonError` if that cannot be written.
        """
        async with self._states.turn(self._name):
            state = self._states.get(self._name)
            if state.owner != owner:
                await self._states.save(msgspec.structs.replace(state, owner=owner))

    @property
    def is_starting(self) -> bool:
        """Whether clients may have written to the store, though the device is not known to be live."""
        return self._is_starting

    def starting(self) -> None:
        """START_DEV is about to be sent: from now on clients may write to the store before the start is known."""
        self._is_starting = True

    def served(self) -> None:
        """The device is live: clients may have written to the store, so it stays bound."""
        self._before, self._is_starting = None, False

    async def backend_ended(self) -> None:
        """A backend served nothing, or ended before the device was live: as `undo`, unless the disk is starting."""
        if not self._is_starting:
            await self.undo()

    async def undo(self) -> None:
        """The device did not become live: unbind a store that was bound since; a failure is logged."""
        async with self._states.turn(self._name):
            before, self._before, self._is_starting = self._before, None, False
            if before is not None:
                # The owner stays: its lock may still be held, and the next backend may break exactly that one.
                undone = msgspec.structs.replace(before, generation=self.generation, owner=self.owner)
                await self._try_to_save(undone)

    async def learn(
        self,
        served: wire.Attach | None,
        size_bytes: int,
        kind: str,
        generation: int,
        resized_bytes: int = 0,
    ) -> None:
        """Bind the store that an earlier daemon served the device from, if no store is bound; a failure is logged.

        The state directory may have been lost, or that daemon kept none.
        """
        async with self._states.turn(self._name):
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
                resized_bytes=resized_bytes,
            )
            learnt = msgspec.structs.replace(state, store=known, generation=max(generation, state.generation))
            if learnt != state:
                await self._try_to_save(learnt)

    async def rebind(self) -> None:
        """Bind the next store that attaches, whatever its identity.  Raises `DaemonError` if that cannot be written."""
        async with self._states.turn(self._name):
            try:
                state = self._states.get(self._name)
            except DaemonError:
                unknown = Store(kind=UNKNOWN_KIND, size_bytes=0)
                state = DeviceState(name=self._name, generation=self.generation, store=unknown)
            if state.store is not None:
                await self._states.save(msgspec.structs.replace(state, takes_next=True))
                _log.warning("%s: the next store that attaches becomes its own", self._name)

    async def take_over(self, takes_over: bool) -> None:
        """Whether the next backend breaks its store's lock, no matter which client holds it.

        Raises `DaemonError` if that cannot be written, or if the name's state cannot be read.
        """
        async with self._states.turn(self._name):
            state = self._states.get(self._name)
            if state.takes_over != takes_over:
                await self._states.save(msgspec.structs.replace(state, takes_over=takes_over))
                if takes_over:
                    _log.warning(
                        "%s: the next backend takes its store over from any other client", self._name
                    )

    async def forget(self, has_device: Callable[[], bool] = lambda: False) -> None:
        """Unbind the store of a device deleted on purpose; the name keeps its generation.  A failure is logged.

        Nothing is changed if the name `has_device` by the time that its state can be written.
        """
        async with self._states.turn(self._name):
            if self._states.knows(self._name) and not has_device():
                await self._try_to_save(
                    DeviceState(name=self._name, generation=self.generation, owner=self.owner)
                )

    async def end(self) -> None:
        """The device ends with its daemon: unbind a store that ends with its device.  A failure is logged."""
        store = self.store
        if store is not None and store.identity.ends_with_device:
            await self.forget()

    @property
    def store(self) -> Store | None:
        """The bound store; None if there is none or the state cannot be read."""
        try:
            return self._states.get(self._name).store
        except DaemonError:
            return None

    def _has_ended(self, store: Store) -> bool:
        return _is_volatile(store) and store.boot != self._boot

    def _check(self, bound: Store, attach: wire.Attach) -> None:
        if not self._is_same(bound, attach):
            raise AttachRefused(
                f"device {self._name} is served from {_words(bound)}, this backend brings "
                f"{_brought(bound, attach)}: bring the first one back, or accept this one "
                f"with: ublkpool rebind {self._name}"
            )
        if 0 < attach.size_bytes < bound.size_bytes:
            raise AttachRefused(
                f"device {self._name} was served with {bound.size_bytes} bytes, this backend offers "
                f"{attach.size_bytes} bytes of {_words(bound)}: raise its size=, bring back what the store has lost, "
                f"or accept that with: ublkpool rebind {self._name}"
            )

    def _is_same(self, bound: Store, attach: wire.Attach) -> bool:
        if _is_anonymous(bound):
            # A backend of an older version, or in another language, that told no identity to compare with.
            return bound.kind in (*_ANY_KIND, attach.kind)
        brought = attach.identity or wire.Identity()
        return is_same_store(bound.identity, brought, is_same_boot=bound.boot == self._boot)

    async def _try_to_save(self, state: DeviceState) -> None:
        try:
            await self._states.save(state)
        except DaemonError as error:
            _log.error("%s: %s", self._name, error)


def _is_anonymous(store: Store) -> bool:
    """Whether its backend told no identity, so that it cannot be compared with another store."""
    return not store.identity.value and not store.identity.in_boot


def _is_volatile(store: Store) -> bool:
    """Whether the store ends with the boot: its identity holds for one boot only."""
    return not store.identity.value and bool(store.identity.in_boot)


def _brought(bound: Store, attach: wire.Attach) -> str:
    """The refused store, for people."""
    if attach.identity is not None and attach.identity.store:
        return attach.identity.store
    if _is_anonymous(bound):
        return f"a store of the backend {attach.kind}"
    return "a store without an identity"


def _words(store: Store) -> str:
    """A store, for people."""
    return store.identity.store or f"a store of the backend {store.kind}"
