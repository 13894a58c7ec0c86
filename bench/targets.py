"""The project's performance targets, as ratios within one run, and the results against them.  Pure; asserts nothing."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from bench.ratios import Spread, ratio_spread
from bench.results import Result, Transport

QD1, WRITE, READ, LARGE = "randwrite 4k qd1", "randwrite 4k qd32 x2", "randread 4k qd32 x2", "write 512k qd8"
State = Literal["reached", "short", "not measured"]


class Target(NamedTuple):
    """`goal` times the baseline, for these kinds of ours in these cells, over this transport."""

    kinds: tuple[str, ...]
    transport: Transport
    baseline: str
    goal: float
    cells: tuple[str, ...]


class Verdict(NamedTuple):
    """The result of one kind in one cell; `over`: the transport of the measured contestant."""

    kind: str
    cell: str
    baseline: str
    wanted_over: str
    over: str
    goal: float
    ratio: Spread | None

    @property
    def state(self) -> State:
        """By the median."""
        if self.ratio is None:
            return "not measured"
        return "reached" if self.ratio.median >= self.goal else "short"


_SERVED = ("null, pool", "null, backend", "memory, pool", "memory, backend")
_FILES = ("file, pool", "file, backend")
TARGETS = (
    Target(("worker null",), "", "kublk null -g", 1.0, (QD1, WRITE, READ, LARGE)),
    Target(("null inside", "memory inside"), "", "kublk null -g", 0.98, (QD1, WRITE, READ)),
    Target(("null inside", "memory inside"), "", "kublk null -g", 1.0, (LARGE,)),
    Target(("file inside",), "", "kublk loop -g", 1.15, (QD1, WRITE, READ)),
    Target(("file inside",), "", "kublk loop -g", 1.05, (LARGE,)),
    Target(_SERVED, "ring", "kublk null -g", 0.8, (WRITE, READ)),
    Target(_SERVED, "ring", "kublk null -g", 0.6, (QD1,)),
    Target(_SERVED, "ring", "kublk null -g", 1.0, (LARGE,)),
    Target(_FILES, "ring", "kublk loop -g", 0.9, (QD1, WRITE, READ, LARGE)),
    Target(("Python functions",), "ring", "nbdkit Python", 4.0, (WRITE, READ)),
    Target(("Python functions",), "ring", "nbdkit Python", 2.0, (QD1,)),
    Target(("Python batch",), "ring", "nbdkit memory", 2.5, (WRITE, READ)),
    Target(("Python functions",), "zeromq", "nbdkit Python", 2.0, (WRITE, READ)),
)


def verdicts(result: Result) -> list[Verdict]:
    """Every target, kind by kind and cell by cell."""
    return [each for target in TARGETS for each in _of(result, target)]


def _of(result: Result, target: Target) -> Iterator[Verdict]:
    for kind in target.kinds:
        name, over = _measured(result, kind, target.transport)
        for cell in target.cells:
            ratio = ratio_spread(result, name, target.baseline, cell) if name else None
            yield Verdict(kind, cell, target.baseline, target.transport, over, target.goal, ratio)


def _measured(result: Result, kind: str, transport: Transport) -> tuple[str, str]:
    """The contestant of a kind over a transport; without such a one, the contestant without a choice, over ZeroMQ.

    A device whose workers answer has no transport.
    """
    parties = {each.transport: each.name for each in result.parties if each.kind == kind}
    if not transport:
        return parties.get("", ""), ""
    if "" in parties:
        return parties[""], "zeromq"
    return parties.get(transport, ""), transport
