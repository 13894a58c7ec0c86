"""The report of mode nbd: clients of one NBD server, against nbd-client.  Pure."""

from bench.cells import Cell, cells_of
from bench.exact import PREFACE, idle_note, parts_table
from bench.ratios import ratio_spread
from bench.results import Party, Result
from bench.tables import (
    counter_table,
    cpu_table,
    failure_list,
    heading,
    markdown_table,
    memory_table,
    speed_table,
    syscall_table,
    who,
)

NBD_BASELINE = "nbd-client"


def nbd_report(result: Result) -> str:
    """Everything about one run."""
    sections = [
        heading(result).replace("## ", "## NBD, exact, " if result.exact else "## NBD, ", 1),
        *([PREFACE + "\n"] if result.exact else []),
        f"### Ratio to {NBD_BASELINE}\n\n" + nbd_table(result),
        *(_of_instructions(result) if result.exact else _of_time(result)),
        "### Counted for each request\n\n" + counter_table(result),
    ]
    if result.failed:
        sections.append("### Failed\n\n" + failure_list(result))
    return "\n".join(sections)


def nbd_table(result: Result) -> str:
    """A row per contestant, a column per cell: the ratio of IOPS or bytes, with its range over the rounds."""
    cells = cells_of(result.mode)
    rows = [[*who(party), *(_ratio(result, party, cell) for cell in cells)] for party in result.parties]
    return markdown_table(["contestant", "transport", *(cell.name for cell in cells)], rows)


def _ratio(result: Result, party: Party, cell: Cell) -> str:
    found = ratio_spread(result, party.name, NBD_BASELINE, cell.name)
    return f"{found.median:.2f} [{found.low:.2f} to {found.high:.2f}]" if found else "none"


def _of_instructions(result: Result) -> list[str]:
    return ["### Whose instructions\n\n" + parts_table(result) + idle_note(result)]


def _of_time(result: Result) -> list[str]:
    return [
        "### Speed\n\n" + speed_table(result),
        "### CPU time for each request\n\n" + cpu_table(result),
        *(["### System calls for each request\n\n" + syscall_table(result)] if result.syscalls else []),
        "### Memory\n\n" + memory_table(result),
    ]
