"""The report of mode rbd: clients of one Ceph cluster, against rbd-nbd.  Pure."""

from bench.cells import Cell, cells_of
from bench.exact import PREFACE, idle_note, instructions, parts_table
from bench.ratios import Spread, middle_of, samples_of, spread
from bench.results import CLUSTER, Party, Result, Sample
from bench.tables import (
    counter_table,
    cpu_table,
    failure_list,
    heading,
    markdown_table,
    memory_table,
    speed_table,
    who,
)

RBD_BASELINE = "rbd-nbd, no cache"
"""The peer that keeps the same promise: an answered write is in the cluster."""
GOAL = 0.8
"""Of the baseline's instructions, in every cell."""
_LIBRBD = "librbd"


def rbd_report(result: Result) -> str:
    """Everything about one run."""
    title = "## Ceph RBD, exact, " if result.exact else "## Ceph RBD, "
    sections = [
        heading(result).replace("## ", title, 1),
        *(_of_instructions(result) if result.exact else _of_time(result)),
        "### Counted for each request\n\n" + counter_table(result),
    ]
    if result.failed:
        sections.append("### Failed\n\n" + failure_list(result))
    return "\n".join(sections)


def client_instructions(sample: Sample) -> float:
    """Instructions for each request of all but the cluster's servers: fio, the client and the kernel for both."""
    return (sample.busy - sample.shares.get(CLUSTER, 0.0)) * instructions(sample.iops)


def client_ratio(result: Result, contestant: str, cell: str) -> Spread | None:
    """The ratio of instructions to the baseline's over the rounds; None if no round has both."""
    base = {each.round: client_instructions(each) for each in samples_of(result, RBD_BASELINE, cell)}
    return spread(
        [
            client_instructions(each) / base[each.round]
            for each in samples_of(result, contestant, cell)
            if base.get(each.round)
        ]
    )


def _of_instructions(result: Result) -> list[str]:
    return [
        PREFACE + "\n",
        f"### Client instructions for each request, ratio to {RBD_BASELINE}\n\n"
        "All that ran but the cluster's servers, fio and the kernel included.\n\n"
        + client_table(result)
        + verdict(result),
        f"### Whose instructions\n\n{_LIBRBD} is a part of its client's process.\n\n"
        + parts_table(result)
        + idle_note(result),
        "### Speed\n\n"
        "In the guest's time: 1e9 / IOPS is all instructions for each request, the cluster's servers included. "
        "Those are more than the client's for a write of 4 KiB.\n\n" + speed_table(result),
    ]


def client_table(result: Result) -> str:
    """A row per contestant; for each cell the instructions and the ratio with its range over the rounds."""
    cells = cells_of(result.mode)
    head = ["contestant", "transport", *(text for cell in cells for text in (cell.name, "ratio"))]
    rows = [
        [*who(party), *(text for cell in cells for text in _client(result, party, cell))]
        for party in result.parties
    ]
    return markdown_table(head, rows)


def _client(result: Result, party: Party, cell: Cell) -> tuple[str, str]:
    samples = samples_of(result, party.name, cell.name)
    if not samples:
        return "failed", ""
    found = f"{middle_of([client_instructions(each) for each in samples]):,.0f}"
    ratio = client_ratio(result, party.name, cell.name)
    return found, f"{ratio.median:.2f} [{ratio.low:.2f} to {ratio.high:.2f}]" if ratio else ""


def verdict(result: Result) -> str:
    """A sentence: in which cells ours needs at most the goal's share of the baseline's instructions."""
    lines = []
    for party in result.parties:
        if party.family != "ublkpool":
            continue
        found = {cell.name: client_ratio(result, party.name, cell.name) for cell in cells_of(result.mode)}
        missed = [
            f"{name} ({ratio.median:.2f})" if ratio else f"{name} (not measured)"
            for name, ratio in found.items()
            if ratio is None or ratio.median > GOAL
        ]
        state = f"missed in {', '.join(missed)}" if missed else "reached in every cell"
        lines.append(f"\nGoal, at most {GOAL:g} of {RBD_BASELINE}: {party.name}: {state}.\n")
    return "".join(lines)


def _of_time(result: Result) -> list[str]:
    return [
        "### Speed\n\n" + speed_table(result),
        "### CPU time for each request\n\n" + cpu_table(result),
        "### Memory\n\n" + memory_table(result),
    ]
