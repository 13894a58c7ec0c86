"""What the project set out to reach, as ratios within one run, and how far it is.  Pure: nothing is asserted here."""

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
    """One kind in one cell; `over` is the transport that it was measured over."""

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
    """Who stands for a kind over a transport; where there was no choice of one, whoever there is, over ZeroMQ.

    Where the worker answers there is nobody to talk to, and no transport.
    """
    parties = {each.transport: each.name for each in result.parties if each.kind == kind}
    if not transport:
        return parties.get("", ""), ""
    if "" in parties:
        return parties[""], "zeromq"
    return parties.get(transport, ""), transport
