"""The report of a run on one CPU where each instruction takes 1 ns: it counts instructions, not time.  Pure."""

from collections.abc import Sequence

from bench.cells import CELLS, Cell, cells_of
from bench.ratios import middle_of, ratio_spread, samples_of, value_spread
from bench.results import Party, Result, Sample
from bench.tables import BASELINE, counter_table, failure_list, markdown_table, rounds_text, target_table
from bench.targets import verdicts

BUSY_MIN = 0.97
"""Below this share the CPU was idle at times, and a request took fewer instructions than 1e9/IOPS."""
PREFACE = (
    "An exact guest: one CPU on which each instruction takes 1 ns, those of fio and the kernel included. So "
    "1e9/IOPS is the instructions of the whole machine for each request, and a ratio of IOPS is one of "
    "instructions: at 0.5 they are twice as many. No cache, no wake-up across CPUs and no waiting for memory "
    "counts, and work of two processes at the same time gains nothing."
)


def instructions(iops: float) -> float:
    """Instructions of the whole machine per request, if the CPU was busy all the time."""
    return 1e9 / iops if iops else 0.0


def spoken_exactly(sample: Sample) -> str:
    """A sample as a line of progress."""
    parts = ", ".join(f"{part} {_of_part(sample, part):,.0f}" for part in sample.shares)
    return f"{instructions(sample.iops):,.0f} instructions a request ({parts}), busy {sample.busy:.1%}"


def _of_part(sample: Sample, part: str) -> float:
    return sample.shares[part] * instructions(sample.iops)


def exact_report(result: Result) -> str:
    """Everything about one run."""
    sections = [
        _heading(result),
        f"### Instructions for each request, ratio to {BASELINE}\n\n"
        + work_table(result)
        + idle_note(result),
        "### Whose instructions\n\n" + parts_table(result),
        "### Targets\n\n" + target_table(verdicts(result)),
        "### Counted for each request\n\n" + counter_table(result),
    ]
    if result.failed:
        sections.append("### Failed\n\n" + failure_list(result))
    return "\n".join(sections)


def _heading(result: Result) -> str:
    revision = f", revision {result.revision}" if result.revision else ""
    return (
        f"## Exact, Linux {result.kernel}\n\n{PREFACE}\n\n"
        f"{result.date}{revision}; {rounds_text(result)} of {result.runtime_s:g} s for each cell.\n"
    )


def work_table(result: Result) -> str:
    """A row per contestant; for each cell the instructions, and the ratio with its range over the rounds."""
    head = ["contestant", "transport", *(text for cell in CELLS for text in (cell.name, "ratio"))]
    rows = [
        [party.kind, party.transport, *(text for cell in CELLS for text in _work(result, party, cell))]
        for party in result.parties
    ]
    return markdown_table(head, rows)


def _work(result: Result, party: Party, cell: Cell) -> tuple[str, str]:
    if value_spread(result, party.name, cell.name) is None:
        return "failed", ""
    found = middle_of([instructions(each.iops) for each in samples_of(result, party.name, cell.name)])
    ratio = ratio_spread(result, party.name, BASELINE, cell.name)
    return f"{found:,.0f}", f"{ratio.median:.3f} [{ratio.low:.3f} to {ratio.high:.3f}]" if ratio else ""


def idle_note(result: Result) -> str:
    """A sentence that names the contestants during whose runs the CPU was idle at times, or says that none were."""
    waited = [
        f"{party.name}, {cell.name} ({busy:.0%} busy)"
        for party in result.parties
        for cell in cells_of(result.mode)
        if (samples := samples_of(result, party.name, cell.name))
        and (busy := middle_of([each.busy for each in samples])) < BUSY_MIN
    ]
    if not waited:
        return f"\nThe CPU was busy at least {BUSY_MIN:.0%} of the time in every cell.\n"
    return f"\nThe CPU idled, and time is not all instructions: {'; '.join(waited)}.\n"


def parts_table(result: Result) -> str:
    """Instructions per request of each part, with those in the kernel on its behalf."""
    cells = cells_of(result.mode)
    rows = [
        [party.kind, party.transport, *(_parts(samples_of(result, party.name, cell.name)) for cell in cells)]
        for party in result.parties
    ]
    return markdown_table(["contestant", "transport", *(cell.name for cell in cells)], rows)


def _parts(samples: Sequence[Sample]) -> str:
    names = list(dict.fromkeys(name for each in samples for name in each.shares))
    middles = {name: middle_of([_of_part(each, name) for each in samples]) for name in names}
    return ", ".join(f"{name} {found:,.0f}" for name, found in middles.items() if found >= 1)
