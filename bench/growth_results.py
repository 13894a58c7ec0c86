"""The results of a growth run, and their tables.  Pure."""

import msgspec

from bench.exact import instructions
from bench.tables import markdown_table, number


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One point of one series: `at` is the value on `axis`; CPU time in microseconds per request."""

    axis: str
    at: int
    iops: float = 0.0
    machine_us: float = 0.0
    worker_us: float = 0.0
    backend_us: float = 0.0
    busy: float = 0.0
    """The share of the CPUs' time in which tasks ran."""
    enters: float = 0.0
    """`io_uring_enter` calls of the workers for each request, as they count them."""
    syscalls: dict[str, float] = {}
    """All system calls per request by part, as the kernel counts them; empty if it cannot."""


class Idle(msgspec.Struct, frozen=True, kw_only=True):
    """Memory of idle processes, KiB each, with this number of devices."""

    devices: int
    part: str
    processes: int
    pss_kib: float
    uss_kib: float


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """A duration in seconds."""

    what: str
    seconds: float


class Growth(msgspec.Struct, kw_only=True):
    """A growth run on one kernel."""

    kernel: str
    date: str
    cpus: int
    emulated: bool
    exact: bool = False
    """Measured where each instruction takes 1 ns."""
    revision: str = ""
    host_load: str = ""
    steps: list[Step] = []
    idle: list[Idle] = []
    timings: list[Timing] = []
    errors: list[str] = []


def growth_report(growth: Growth) -> str:
    """Everything about one run."""
    revision = f", revision {growth.revision}" if growth.revision else ""
    where = (
        ", an exact guest (each instruction takes 1 ns)"
        if growth.exact
        else ", emulated"
        if growth.emulated
        else ""
    )
    load = f" The host's load average was {growth.host_load} before." if growth.host_load else ""
    exact = ", exact" if growth.exact else ""
    sections = [
        f"## Growth{exact}, Linux {growth.kernel}\n\n"
        f"{growth.date}{revision}, {growth.cpus} CPUs{where}. Backend `null`, "
        f"need_get_data, placement pool, the transport that it takes by itself.{load}\n"
    ]
    steps_table = _exact_table if growth.exact else _steps_table
    for axis in dict.fromkeys(each.axis for each in growth.steps):
        sections.append(f"### {axis}\n\n" + steps_table([each for each in growth.steps if each.axis == axis]))
    if growth.idle:
        sections.append(
            "### Memory while nothing happens\n\n" + _idle_table(growth.idle) + _next_device(growth.idle)
        )
    # In an exact guest time counts instructions while a CPU is busy, and is real while all are idle.
    if growth.timings and not growth.exact:
        rows = [[each.what, f"{each.seconds:.1f}"] for each in growth.timings]
        sections.append("### Time\n\n" + markdown_table(["what", "s"], rows))
    if growth.errors:
        sections.append("### Failed\n\n" + "".join(f"- {each}\n" for each in growth.errors))
    return "\n".join(sections)


def _steps_table(steps: list[Step]) -> str:
    head = [
        "at",
        "IOPS",
        "CPU us a request",
        "worker us",
        "backend us",
        "enters",
        "worker calls",
        "backend calls",
    ]
    return markdown_table(head, [_step_row(each) for each in steps])


def _step_row(each: Step) -> list[str]:
    return [
        f"{each.at:,}",
        number(each.iops),
        number(each.machine_us),
        number(each.worker_us),
        number(each.backend_us),
        f"{each.enters:.2f}",
        *(f"{each.syscalls[part]:.2f}" if part in each.syscalls else "" for part in ("worker", "backend")),
    ]


def _exact_table(steps: list[Step]) -> str:
    head = ["at", "instructions a request", "of the worker", "of the backend", "enters", "busy"]
    return markdown_table(head, [_exact_row(each) for each in steps])


def _exact_row(each: Step) -> list[str]:
    return [
        f"{each.at:,}",
        f"{instructions(each.iops):,.0f}",
        f"{each.worker_us * 1e3:,.0f}",
        f"{each.backend_us * 1e3:,.0f}",
        f"{each.enters:.2f}",
        f"{each.busy:.0%}",
    ]


def _idle_table(idle: list[Idle]) -> str:
    rows = [
        [str(each.devices), each.part, str(each.processes), number(each.pss_kib), number(each.uss_kib)]
        for each in idle
    ]
    return markdown_table(["devices", "part", "processes", "PSS KiB each", "USS KiB each"], rows)


def _next_device(idle: list[Idle]) -> str:
    """The memory per additional device, all processes together: the most devices against the fewest."""
    totals = {each.devices: 0.0 for each in idle}
    for each in idle:
        totals[each.devices] += each.pss_kib * each.processes
    fewest, most = min(totals), max(totals)
    if fewest == most:
        return ""
    more_kib = (totals[most] - totals[fewest]) / (most - fewest)
    return f"\nFrom {fewest} to {most} devices each device more takes {number(more_kib)} KiB, its pool included.\n"
