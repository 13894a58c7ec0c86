"""The cells of the table: fio's options for each, and its results.  Pure."""

import json
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

REGION_BYTES = 64 << 20
"""The used part of every disk; a disk that stores data has it allocated before the first round."""


class Cell(NamedTuple):
    """One workload.  `unit`: the unit that the table shows."""

    name: str
    rw: Literal["randwrite", "randread", "write", "read"]
    block_bytes: int
    depth: int
    jobs: int
    unit: Literal["IOPS", "MB/s"]


CELLS = (
    Cell("randwrite 4k qd1", "randwrite", 4096, 1, 1, "IOPS"),
    Cell("randwrite 4k qd32 x2", "randwrite", 4096, 32, 2, "IOPS"),
    Cell("randread 4k qd32 x2", "randread", 4096, 32, 2, "IOPS"),
    Cell("write 512k qd8", "write", 512 << 10, 8, 1, "MB/s"),
)
NBD_CELLS = (
    CELLS[0],
    Cell("randread 4k qd1", "randread", 4096, 1, 1, "IOPS"),
    *CELLS[1:],
    Cell("read 512k qd8", "read", 512 << 10, 8, 1, "MB/s"),
)
"""The cells of mode nbd: those of the other modes, and each write as a read too."""
RBD_CELLS = (
    *NBD_CELLS[:2],
    Cell("randwrite 4k qd32", "randwrite", 4096, 32, 1, "IOPS"),
    Cell("randread 4k qd32", "randread", 4096, 32, 1, "IOPS"),
    *NBD_CELLS[4:],
)
"""The cells of mode rbd; rbd-nbd has one queue, so one job."""
EVERY_CELL = tuple(dict.fromkeys((*NBD_CELLS, *RBD_CELLS)))


def cells_of(mode: str) -> tuple[Cell, ...]:
    """The cells that a mode measures, in their order."""
    return {"nbd": NBD_CELLS, "rbd": RBD_CELLS}.get(mode, CELLS)


class FioNumbers(NamedTuple):
    """The sums over all jobs of a run."""

    iops: float
    bytes_per_s: float
    latency_us: float

    def shown(self, cell: Cell) -> float:
        """The number that the cell shows."""
        return self.iops if cell.unit == "IOPS" else self.bytes_per_s / 1e6


class FioError(Exception):
    """fio failed; the text is one line."""


def fio_command(node: str, cell: Cell, cpus: Sequence[int], runtime_s: float) -> list[str]:
    """fio's command line: a job for each of `cpus`, on the first REGION_BYTES of the disk."""
    settings: dict[str, object] = {
        "name": "bench",
        "filename": node,
        "ioengine": "io_uring",
        "direct": 1,
        "rw": cell.rw,
        "bs": cell.block_bytes,
        "iodepth": cell.depth,
        "numjobs": cell.jobs,
        "size": REGION_BYTES,
        "time_based": 1,
        "runtime": f"{runtime_s * 1000:.0f}ms",
        "norandommap": 1,
        "randrepeat": 1,
        "cpus_allowed": ",".join(map(str, cpus)),
        "cpus_allowed_policy": "split",
        "group_reporting": 1,
        "thread": 1,
    }
    return ["fio", "--output-format=json", *(f"--{key}={value}" for key, value in settings.items())]


def job_cpus(queues: Sequence[Sequence[int]], jobs: int) -> list[int]:
    """A CPU for each job: the queues in turn, and for each queue its CPUs in turn."""
    return [
        queues[job % len(queues)][job // len(queues) % len(queues[job % len(queues)])] for job in range(jobs)
    ]


def parse_fio(output: str, status: int) -> FioNumbers:
    """The numbers in fio's JSON, which may follow lines of warnings.  Raises `FioError`."""
    remark, brace, rest = output.partition("{")
    if not brace:
        raise FioError(f"fio ended with {status}: {_one_line(remark)}")
    found, _ = json.JSONDecoder().raw_decode(brace + rest)
    jobs: list[dict[str, Any]] = found["jobs"]
    failed = [job["error"] for job in jobs if job["error"]]
    if status or failed:
        raise FioError(f"fio ended with {status}, errors {failed}: {_one_line(remark)}")
    sides = [job[side] for job in jobs for side in ("read", "write") if job[side]["total_ios"]]
    total = sum(side["total_ios"] for side in sides)
    if not total:
        raise FioError("fio ended without having moved anything")
    return FioNumbers(
        iops=sum(side["iops"] for side in sides),
        bytes_per_s=sum(side["bw_bytes"] for side in sides),
        latency_us=sum(side["lat_ns"]["mean"] * side["total_ios"] for side in sides) / total / 1e3,
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())[-300:] or "it said nothing"
