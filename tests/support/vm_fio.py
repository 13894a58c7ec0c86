"""fio on a block device, with what it wrote and whether every byte came back."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Sizes from a sector to the largest request, most of them small, as file systems make them.
MIXED_SIZES = "512/10:4k/30:12k/15:64k/20:200k/15:512k/10"
_TIMEOUT_S = 600


class FioResult(NamedTuple):
    """What all jobs of a run did together; bytes."""

    written_bytes: int
    read_bytes: int
    trimmed_bytes: int
    errors: int
    text: str


def queue_cpus(path: str, queues: int) -> list[int]:
    """For each hardware queue of a disk one CPU whose requests come to it."""
    directory = Path("/sys/block") / Path(path).name / "mq"
    lists = [(directory / str(queue) / "cpu_list").read_text() for queue in range(queues)]
    return [int(each.split(",")[0]) for each in lists]


def run_fio(path: str, jobs: int = 1, cpus: Sequence[int] = (), **options: object) -> FioResult:
    """Run fio on a disk, each of `jobs` processes in a part of its own (`size`), verified unless told otherwise.

    Raises `AssertionError` with what fio said if anything failed or differed.
    """
    process = start_fio(path, jobs, cpus, **options)
    return finish_fio(process)


def start_fio(
    path: str, jobs: int = 1, cpus: Sequence[int] = (), **options: object
) -> "subprocess.Popen[str]":
    """The same without waiting; `finish_fio` does."""
    settings = {**_DEFAULTS, **_placing(jobs, cpus, options), **options}
    command = ["fio", "--output-format=json", f"--filename={path}", *_arguments(settings)]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


_DEFAULTS: Mapping[str, object] = {
    "name": "t",
    "ioengine": "libaio",
    "direct": 1,
    "rw": "randwrite",
    "bssplit": MIXED_SIZES,
    "verify": "crc32c",
    "verify_fatal": 1,
    "verify_state_save": 0,
    "end_fsync": 0,
    "group_reporting": 1,
    "allow_mounted_write": 0,
    "randrepeat": 1,
    "thread": 1,
}


def _placing(jobs: int, cpus: Sequence[int], options: Mapping[str, object]) -> dict[str, object]:
    placing: dict[str, object] = {"numjobs": jobs}
    if jobs > 1 and "offset_increment" not in options:
        placing["offset_increment"] = options["size"]
    if cpus:
        placing |= {"cpus_allowed": ",".join(map(str, cpus)), "cpus_allowed_policy": "split"}
    return placing


def _arguments(settings: Mapping[str, object]) -> list[str]:
    return [f"--{key}={value}" for key, value in settings.items() if value is not None]


def finish_fio(process: "subprocess.Popen[str]", may_fail: bool = False) -> FioResult:
    """Wait for it; see `run_fio`."""
    output, _ = process.communicate(timeout=_TIMEOUT_S)
    result = _parse(output, process.returncode)
    assert may_fail or (process.returncode == 0 and result.errors == 0), result.text
    return result


def _parse(output: str, status: int) -> FioResult:
    complaints, brace, rest = output.partition("{")
    if not brace:
        return FioResult(0, 0, 0, 1, f"fio ended with {status}:\n{output}")
    found, end = json.JSONDecoder().raw_decode(brace + rest)
    jobs: list[dict[str, Any]] = found["jobs"]

    def moved(direction: str) -> int:
        return sum(int(job[direction]["io_bytes"]) for job in jobs)

    errors = sum(int(job["error"] != 0) for job in jobs)
    text = f"fio ended with {status}, {errors} jobs failed:\n{complaints}{(brace + rest)[end:]}"
    return FioResult(moved("write"), moved("read"), moved("trim"), errors, text)
