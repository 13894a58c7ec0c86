"""The results of a density run, and their tables.  Pure."""

from collections.abc import Sequence
from statistics import median

import msgspec

from bench.tables import markdown_table, number

FIRST_AND_LAST = 10
"""How many adds at each end of a long row are compared."""


class Life(msgspec.Struct, frozen=True, kw_only=True):
    """One device's start and end in milliseconds: from the call to a node that reads, and until the node is gone."""

    what: str
    add_ms: float
    del_ms: float


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """The processes of one kind with this number of idle devices; each value is that of one process, on average."""

    devices: int
    part: str
    processes: int
    threads: float
    descriptors: float
    own_kib: float
    """Private pages that belong to no pool."""
    pool_kib: float
    """Pages of the pool that this process has touched."""
    wakes_per_s: float
    """Voluntary context switches."""


class Whole(msgspec.Struct, frozen=True, kw_only=True):
    """What the machine has given to this number of devices, the kernel's own memory included."""

    devices: int
    used_kib_each: float
    pool_kib_each: float


class Density(msgspec.Struct, kw_only=True):
    """A density run on one kernel."""

    kernel: str
    date: str
    cpus: int
    emulated: bool
    revision: str = ""
    host_load: str = ""
    lives: list[Life] = []
    parts: list[Part] = []
    wholes: list[Whole] = []
    adds_ms: list[float] = []
    """Of the devices that were added one after another, in that order."""
    dels_ms: list[float] = []
    checked_blocks: int = 0
    """Random blocks that were written while all of them lived, and read what was written."""
    errors: list[str] = []


def density_report(density: Density) -> str:
    """Everything about one run."""
    revision = f", revision {density.revision}" if density.revision else ""
    where = ", emulated" if density.emulated else ""
    load = f" The host's load average was {density.host_load} before." if density.host_load else ""
    sections = [
        f"## Density, Linux {density.kernel}\n\n{density.date}{revision}, {density.cpus} CPUs{where}. "
        f"Devices of one queue, depth 128, requests up to 512 KiB.{load}\n",
        "### From the call to a node that reads\n\n" + _lives_table(density.lives),
    ]
    if density.adds_ms:
        checked = f"\nRandom blocks that were written and read while all lived: {density.checked_blocks}.\n"
        sections.append("### One device after another\n\n" + _row_table(density) + checked)
    if density.wholes:
        sections.append("### What an idle device takes of the machine\n\n" + _wholes_table(density.wholes))
    if density.parts:
        sections.append("### Idle processes\n\n" + _parts_table(density.parts))
    if density.errors:
        sections.append("### Failed\n\n" + "".join(f"- {each}\n" for each in density.errors))
    return "\n".join(sections)


def _lives_table(lives: Sequence[Life]) -> str:
    rows = []
    kublk = [each for each in lives if each.what == "kublk"]
    for what in dict.fromkeys(each.what for each in lives):
        found = [each for each in lives if each.what == what]
        added, deleted = (median(getattr(each, name) for each in found) for name in ("add_ms", "del_ms"))
        ratios = ["", ""]
        if kublk:
            ratios = [
                f"{took / median(getattr(each, name) for each in kublk):.2f}"
                for took, name in ((added, "add_ms"), (deleted, "del_ms"))
            ]
        rows.append([what, str(len(found)), number(added), ratios[0], number(deleted), ratios[1]])
    return markdown_table(["what", "times", "add ms", "of kublk's", "del ms", "of kublk's"], rows)


def _row_table(density: Density) -> str:
    rows = [
        [
            what,
            str(len(taken)),
            number(median(taken[:FIRST_AND_LAST])),
            number(median(taken[-FIRST_AND_LAST:])),
        ]
        for what, taken in (("add", density.adds_ms), ("del", density.dels_ms))
        if taken
    ]
    return markdown_table(
        ["what", "devices", f"first {FIRST_AND_LAST} ms", f"last {FIRST_AND_LAST} ms"], rows
    )


def _wholes_table(wholes: Sequence[Whole]) -> str:
    rows = [[str(each.devices), number(each.used_kib_each), number(each.pool_kib_each)] for each in wholes]
    return markdown_table(["devices", "KiB each, pool included", "of that pool"], rows)


def _parts_table(parts: Sequence[Part]) -> str:
    head = ["devices", "part", "processes", "threads", "descriptors", "own KiB", "pool KiB", "wakes a second"]
    rows = [
        [
            str(each.devices),
            each.part,
            str(each.processes),
            f"{each.threads:.1f}",
            number(each.descriptors),
            number(each.own_kib),
            number(each.pool_kib),
            f"{each.wakes_per_s:.2f}",
        ]
        for each in parts
    ]
    return markdown_table(head, rows)
