"""The report in Markdown, made of a result alone.  Pure."""

from collections.abc import Iterable, Sequence

from bench.cells import CELLS, Cell, cells_of
from bench.instructions import CASES, InstructionCost
from bench.ratios import Spread, middle_of, ratio_spread, samples_of, value_spread
from bench.results import Party, Result, Sample
from bench.targets import Verdict, verdicts

BASELINE = "kublk null -g"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, with the first column aligned left and the others right."""
    lines = [_line(head), _line([":---", *("---:" for _ in head[1:])])]
    return "\n".join([*lines, *(_line(row) for row in rows)]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(each.replace("|", "\\|") for each in cells) + " |"


def report(result: Result, instructions: Sequence[InstructionCost] = ()) -> str:
    """Everything about one run."""
    sections = [
        heading(result),
        "### Speed\n\n" + speed_table(result),
        *(f"### {cell.name}\n\n" + cell_table(result, cell) for cell in CELLS),
        "### Targets\n\n" + target_table(verdicts(result)),
        "### CPU time for each request\n\n" + cpu_table(result),
        "### Counted for each request\n\n" + counter_table(result),
        *(["### System calls for each request\n\n" + syscall_table(result)] if result.syscalls else []),
        "### Memory\n\n" + memory_table(result),
    ]
    if instructions:
        sections.append("### Instructions of the queue core for each request\n\n" + cost_table(instructions))
    if result.failed:
        sections.append("### Failed\n\n" + failure_list(result))
    return "\n".join(sections)


def heading(result: Result) -> str:
    """The versions, the machine and the time of the run."""
    where = (
        "a guest under TCG, which emulates every instruction" if result.emulated else "this machine itself"
    )
    transports = sorted({str(each.transport) for each in result.parties} - {""}) or ["whatever there was"]
    revision = f", revision {result.revision}" if result.revision else ""
    load = f" The host's load average was {result.host_load} before." if result.host_load else ""
    return (
        f"## Linux {result.kernel}\n\n"
        f"{result.date}{revision}; {where}, {result.cpus} CPUs. Mode {result.mode}: {rounds_text(result)} of "
        f"{result.runtime_s:g} s for each cell. Transport: {' and '.join(transports)}. "
        f"Everybody idle, {result.idle_load:.1%} of the CPUs' time is used.{load}\n"
    )


def rounds_text(result: Result) -> str:
    """The number of rounds with results."""
    done = f"{result.rounds_done} round{'' if result.rounds_done == 1 else 's'}"
    return done if result.rounds_done == result.rounds else f"{done}, of {result.rounds} that were wanted,"


def speed_table(result: Result) -> str:
    """The overview: medians."""
    cells = cells_of(result.mode)
    head = ["contestant", "transport", *(f"{cell.name}, {cell.unit}" for cell in cells)]
    rows = [
        [*who(party), *(_median(value_spread(result, party.name, cell.name)) for cell in cells)]
        for party in result.parties
    ]
    return markdown_table(head, rows)


def who(party: Party) -> list[str]:
    """The first two columns; peers have no transport."""
    return [party.kind, party.transport]


def _median(found: Spread | None) -> str:
    return "failed" if found is None else number(found.median)


def cell_table(result: Result, cell: Cell) -> str:
    """One cell: the number and its range, the ratio to the baseline and its range, CPU time, latency."""
    head = [
        "contestant",
        "transport",
        cell.unit,
        "range",
        f"ratio to {BASELINE}",
        "range",
        "CPU us",
        "latency us",
    ]
    return markdown_table(head, [_cell_row(result, party, cell) for party in result.parties])


def _cell_row(result: Result, party: Party, cell: Cell) -> list[str]:
    value = value_spread(result, party.name, cell.name)
    if value is None:
        return [*who(party), "failed", "", "", "", "", ""]
    ratio = ratio_spread(result, party.name, BASELINE, cell.name)
    samples = samples_of(result, party.name, cell.name)
    return [
        *who(party),
        number(value.median),
        f"{number(value.low)} to {number(value.high)}",
        f"{ratio.median:.2f}" if ratio else "",
        f"{ratio.low:.2f} to {ratio.high:.2f}" if ratio else "",
        number(middle_of([each.machine_us for each in samples])),
        number(middle_of([each.latency_us for each in samples])),
    ]


def target_table(found: Sequence[Verdict]) -> str:
    """Every target with its goal and the result."""
    head = ["ours", "cell", "against", "wanted over", "measured over", "goal", "ratio", "range", "state"]
    return markdown_table(head, [_target_row(each) for each in found])


def _target_row(each: Verdict) -> list[str]:
    ratio = (
        [f"{each.ratio.median:.2f}", f"{each.ratio.low:.2f} to {each.ratio.high:.2f}"]
        if each.ratio
        else ["", ""]
    )
    return [
        each.kind,
        each.cell,
        each.baseline,
        each.wanted_over,
        each.over,
        f"{each.goal:.1f}",
        *ratio,
        each.state,
    ]


def cpu_table(result: Result) -> str:
    """Where the CPU time of a request goes, in microseconds: user and system, part by part."""
    rows = []
    for party in result.parties:
        for cell in cells_of(result.mode):
            samples = samples_of(result, party.name, cell.name)
            if samples:
                machine = number(middle_of([each.machine_us for each in samples]))
                rows.append([*who(party), cell.name, machine, _parts(samples)])
    return markdown_table(
        ["contestant", "transport", "cell", "whole machine us", "of which user + system us"], rows
    )


def _parts(samples: Sequence[Sample]) -> str:
    names = list(dict.fromkeys(name for each in samples for name in each.parts_us))
    texts = []
    for name in names:
        user, system = (
            middle_of([each.parts_us[name][side] for each in samples if name in each.parts_us])
            for side in (0, 1)
        )
        if user + system >= 0.05:
            texts.append(f"{name} {number(user)} + {number(system)}")
    return ", ".join(texts)


def counter_table(result: Result) -> str:
    """Our workers' counters: system calls and loop turns per request, bytes copied per byte moved."""
    names = list(dict.fromkeys(name for each in result.samples for name in each.counters))
    rows = []
    for party in result.parties:
        for cell in cells_of(result.mode):
            samples = [each for each in samples_of(result, party.name, cell.name) if each.counters]
            if samples:
                middles = [middle_of([each.counters.get(name, 0.0) for each in samples]) for name in names]
                rows.append([*who(party), cell.name, *(f"{each:.2f}" for each in middles)])
    return markdown_table(
        ["ours", "transport", "cell", *(_COUNTER_HEADS.get(name, name) for name in names)], rows
    )


_COUNTER_HEADS = {
    "enters": "io_uring_enter",
    "turns": "turns of the loop",
    "wakeups": "entries of Python",
    "bells": "doorbells",
    "commits": "commits",
    "descriptors_in": "descriptors in",
    "descriptors_out": "descriptors out",
    "kernel_bytes": "bytes copied by the kernel a byte",
    "own_bytes": "by us a byte",
}


def syscall_table(result: Result) -> str:
    """System calls of each part, counted by the kernel."""
    rows = [
        [*who(party), each.cell, ", ".join(f"{part} {count:.2f}" for part, count in each.parts.items())]
        for party in result.parties
        for each in result.syscalls
        if each.contestant == party.name
    ]
    return markdown_table(["contestant", "transport", "cell", "system calls"], rows)


def memory_table(result: Result) -> str:
    """The memory of each idle part before the first round."""
    rows = [
        [*who(party), part, f"{pss:,}", f"{uss:,}"]
        for party in result.parties
        for part, (pss, uss) in party.memory_kib.items()
    ]
    return markdown_table(["contestant", "transport", "part", "PSS KiB", "USS KiB"], rows)


def cost_table(instructions: Sequence[InstructionCost]) -> str:
    """Transports and batches side by side."""
    columns = sorted({(each.transport, each.batch) for each in instructions})
    found = {(each.case, (each.transport, each.batch)): f"{each.instructions:.0f}" for each in instructions}
    rows = [
        [text, *(found.get((case, column), "") for column in columns)]
        for case, text in CASES.items()
        if (case, columns[0]) in found
    ]
    heads = [f"{transport}, {batch} at a time" for transport, batch in columns]
    return markdown_table(["request", *heads], rows)


def failure_list(result: Result) -> str:
    """The failures."""
    lines = [f"- {each.name}: {each.error}" for each in result.parties if each.error]
    lines += [f"- {each.contestant}, {each.cell}: {each.error}" for each in result.samples if each.error]
    return "\n".join(lines) + "\n"


def number(value: float) -> str:
    """The number with no, one or two decimals: 123, 12.3, 0.12."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 1 else f"{value:.2f}"
