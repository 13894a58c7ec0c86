"""A whole check: its rounds, and the report.

Owns what `ublkpool backend check` and `ublkpool.testing` share: options in, a `Report` out.
"""

import asyncio
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from ublkpool.bufpool.sdk.keeper import keeper_path
from ublkpool.bufpool.way_out import too_long_for_sockets
from ublkpool.daemon.check.host import DEVICE, LOG, NotStarted, OtherPlacement, Placement, Setting
from ublkpool.daemon.check.process import Command, Options, last_words
from ublkpool.daemon.check.promises import PROMISES, Broken
from ublkpool.daemon.check.round import Memory, Round
from ublkpool.daemon.device.kept_memory import drop_kept

CheckTransport = Literal["ring", "zeromq", "both"]
SECONDS_DEFAULT = 2.0
DEADLINE_DEFAULT_S = 10.0
SIZE_DEFAULT_BYTES = 64 << 20
"""Of a device whose backend has no size of its own."""
START_DEADLINE_S = 30.0
_EVENTS_SHOWN = 3
_ROUND_S_MAX = 10.0
_DUE = (("kill", "fence", "stop"), ("kill", "fence"), ("fence", "kill"), ("kill",))
"""What happens to the backend in each round of even the shortest check."""


class CheckOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a check is asked for; sizes in bytes, times in seconds."""

    seconds: float = SECONDS_DEFAULT
    seed: int = 0
    transport: CheckTransport = "both"
    size_bytes: int = 0
    """The size that the device is created with; 0: the backend's."""
    queues: int = 2
    depth: int = 16
    max_io_bytes: int = 256 << 10
    deadline_s: float = DEADLINE_DEFAULT_S
    """How long an answer may take."""
    power_loss: str = ""
    """A command that loses what the store has not flushed, run while no backend runs."""
    allows_errors: bool = False
    layers: tuple[str, ...] = ()
    """As `--layer` of `ublkpool backend`."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a check found; `promise` is empty if every promise was kept."""

    kind: str
    seed: int
    promise: str = ""
    what: str = ""
    round: str = ""
    events: tuple[str, ...] = ()
    replay: str = ""
    log: tuple[str, ...] = ()
    """The last lines of the backend's log."""
    counts: dict[str, int] = {}
    placements: tuple[str, ...] = ()
    """The placements that it served."""
    seconds: float = 0.0

    @property
    def is_kept(self) -> bool:
        """Whether every promise was kept."""
        return not self.promise

    def lines(self) -> list[str]:
        """The report for people."""
        moved = sum(count for name, count in self.counts.items() if name.isupper())
        ends = ", ".join(f"{self.counts.get(each, 0)} {words}" for each, words in _ENDS.items())
        done = f"{moved} requests, {ends}, {self.seconds:.1f} s, seed {self.seed}"
        if self.is_kept:
            served = " and ".join(self.placements)
            return [f"check {self.kind}: every promise was kept with placement {served} ({done})"]
        after = (
            f"  after {', '.join(self.events)}"
            if self.events
            else "  before anything was done to the backend"
        )
        return [
            f"check {self.kind}: broken promise {self.promise}: {PROMISES[self.promise]}",
            f"  {self.what}",
            f"{after} ({self.round})",
            f"  {done}",
            *(f"  its log: {each}" for each in self.log),
            f"  again: {self.replay}",
        ]


_ENDS = {"kill": "kills", "stop": "stops", "fence": "fences"}
_OPTION_NAMES = {
    "seconds": "--seconds",
    "transport": "--transport",
    "size_bytes": "--size",
    "queues": "--queues",
    "depth": "--depth",
    "max_io_bytes": "--max-io",
    "deadline_s": "--deadline",
    "power_loss": "--power-loss",
    "allows_errors": "--allow-errors",
}


def run_check(
    kind: str,
    options: Options,
    asked: CheckOptions,
    show: Callable[[str], None] = lambda text: None,
) -> Report:
    """Check a backend; `show` gets a line on how far it is.  Raises `NotStarted` if the backend cannot start at all."""
    return asyncio.run(_Check(kind, options, asked, show).run())


def _layer_arguments(layers: Sequence[str]) -> tuple[str, ...]:
    return tuple(word for each in layers for word in ("--layer", each))


def _new_directory() -> Path:
    """A run directory whose path leaves room for the names of sockets."""
    directory = Path(tempfile.mkdtemp(prefix="ublkpool-check-"))
    if too_long_for_sockets(directory):
        directory.rmdir()
        directory = Path(tempfile.mkdtemp(prefix="ublkpool-check-", dir="/tmp"))
    return directory


class _Check:
    def __init__(self, kind: str, options: Options, asked: CheckOptions, show: Callable[[str], None]) -> None:
        self._command = Command(kind, options, _layer_arguments(asked.layers))
        self._asked, self._show = asked, show
        nonce = int.from_bytes(os.urandom(4), "little")
        self._memory = Memory(asked.seed, nonce, asked.power_loss, asked.allows_errors)
        self._begun_s = time.monotonic()
        self._served: dict[Setting, Placement] = {}
        self._refusal = ""

    async def run(self) -> Report:
        directory = _new_directory()
        try:
            return await self._run(directory)
        except NotStarted as error:
            # A backend that takes its device's size, such as memory, does not start on a device without one.
            if self._asked.size_bytes or "size" not in str(error):
                raise
            self._asked = msgspec.structs.replace(self._asked, size_bytes=SIZE_DEFAULT_BYTES)
            return await self._run(directory)
        finally:
            await drop_kept(keeper_path(directory, DEVICE))
            shutil.rmtree(directory, ignore_errors=True)

    async def _run(self, directory: Path) -> Report:
        transports = ("ring", "zeromq") if self._asked.transport == "both" else (self._asked.transport,)
        settings = [self._setting(each, place) for place in ("pool", "backend") for each in transports]
        for settings_left, setting, due in self._rounds(settings):
            now_s = time.monotonic()
            share_s = min(self._left_s() / settings_left, _ROUND_S_MAX)
            each = Round(directory, self._command, setting, self._memory, self._beat)
            try:
                await each.run(now_s + share_s, due)
            except OtherPlacement as error:
                self._refusal = str(error)
            except Broken as broken:
                return self._report(directory, each.name, broken)
            else:
                self._served[setting] = setting.placement
        if not self._served:
            raise NotStarted(self._refusal, None)
        return self._report(directory)

    def _rounds(self, settings: list[Setting]) -> Iterator[tuple[int, Setting, tuple[str, ...]]]:
        """Each setting once, then those that the backend serves in turn while there is time.

        Yields how many rounds are to share the time that is left, the setting, and what happens at least.
        """
        for index, setting in enumerate(settings):
            yield len(settings) - index, setting, _DUE[index]
        while self._served and self._left_s() > 0:
            served = list(self._served)
            for index, setting in enumerate(served):
                if self._left_s() > 0:
                    yield len(served) - index, setting, ()

    def _left_s(self) -> float:
        return max(0.0, self._begun_s + self._asked.seconds - time.monotonic())

    def _setting(self, transport: str, placement: Placement) -> Setting:
        asked = self._asked
        return Setting(
            transport,
            placement,
            asked.queues,
            asked.depth,
            asked.max_io_bytes,
            asked.size_bytes,
            asked.deadline_s,
            START_DEADLINE_S,
        )

    def _beat(self, where: str) -> None:
        counts = self._memory.counts
        moved = sum(count for name, count in counts.items() if name.isupper())
        gone_s = time.monotonic() - self._begun_s
        self._show(
            f"check {self._command.kind}: {gone_s:.0f} of {self._asked.seconds:g} s, {where}, {moved} requests, "
            + ", ".join(f"{counts[each]} {words}" for each, words in _ENDS.items())
        )

    def _report(self, directory: Path, where: str = "", broken: Broken | None = None) -> Report:
        memory = self._memory
        return Report(
            kind=self._command.kind,
            seed=self._asked.seed,
            promise=broken.promise if broken else "",
            what=broken.what if broken else "",
            round=where,
            events=tuple(each.words for each in memory.events[-_EVENTS_SHOWN:]),
            replay=self._replay(),
            log=tuple(last_words(directory / LOG)) if broken else (),
            counts=dict(memory.counts),
            placements=tuple(sorted(set(self._served.values()))),
            seconds=time.monotonic() - self._begun_s,
        )

    def _replay(self) -> str:
        """The command line that checks the same again."""
        asked, usual = self._asked, CheckOptions()
        given = [f"--seed {asked.seed}"]
        for name, option in _OPTION_NAMES.items():
            if (value := getattr(asked, name)) != getattr(usual, name):
                given.append(
                    option
                    if value is True
                    else f"{option} {shlex.quote(f'{value:g}' if isinstance(value, float) else str(value))}"
                )
        given += map(shlex.quote, self._command.arguments)
        pairs = map(shlex.quote, self._command.pairs())
        return " ".join(["ublkpool backend check", *given, shlex.quote(self._command.kind), *pairs])
