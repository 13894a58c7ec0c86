"""Runs fio on a block device, with verification of every byte."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

# Sizes from a sector to the largest request, most of them small, as file systems make them.
MIXED_SIZES = "512/20:4k/40:12k/15:64k/15:200k/7:512k/3"
_TIMEOUT_S = 600
_KILL_PATIENCE_S = 10


class FioResult(NamedTuple):
    """The sums over all jobs of a run; sizes in bytes."""

    written_bytes: int
    read_bytes: int
    trimmed_bytes: int
    errors: int
    text: str


def cpus_of_queue(path: str, queue: int) -> list[int]:
    """The CPUs whose requests come to a hardware queue of a disk."""
    directory = Path("/sys/block") / Path(path).name / "mq"
    return [int(each) for each in (directory / str(queue) / "cpu_list").read_text().split(",")]


def queue_cpus(path: str, queues: int) -> list[int]:
    """One CPU for each hardware queue of a disk, whose requests come to that queue."""
    return [cpus_of_queue(path, queue)[0] for queue in range(queues)]


def run_fio(path: str, jobs: int = 1, cpus: Sequence[int] = (), **options: object) -> FioResult:
    """Run fio on a disk, each of `jobs` processes in a part of its own (`size`), verified unless told otherwise.

    Raises `AssertionError` with what fio said if anything failed or differed.
    """
    process = start_fio(path, jobs, cpus, **options)
    return finish_fio(process)


def start_fio(
    path: str, jobs: int = 1, cpus: Sequence[int] = (), **options: object
) -> "subprocess.Popen[str]":
    """Start fio like `run_fio`; `finish_fio` waits for it."""
    return _spawn(path, _arguments({**_DEFAULTS, **_placing(jobs, cpus, options), **options}))


def _spawn(path: str, arguments: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        ["fio", "--output-format=json", f"--filename={path}", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_fio_jobs(
    path: str, jobs: Mapping[str, Mapping[str, object]], size_bytes: int, **shared: object
) -> "subprocess.Popen[str]":
    """Run different jobs at once, each in its own part of `size_bytes`; `shared`: the options of all."""
    plain = {**_DEFAULTS, "verify": None, "verify_fatal": None, "verify_state_save": None, "name": None}
    words = _arguments({**plain, "size": size_bytes, **shared})
    for index, (name, options) in enumerate(jobs.items()):
        words += [f"--name={name}", f"--offset={index * size_bytes}", *_arguments(options)]
    return _spawn(path, words)


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


def drop_fio(process: "subprocess.Popen[str]") -> None:
    """End fio, whatever its state; otherwise its warnings would fail a later test."""
    process.kill()
    # A fio that waits for a disk without a server cannot be killed.
    with suppress(subprocess.TimeoutExpired):
        process.wait(_KILL_PATIENCE_S)
    if process.stdout is not None:
        process.stdout.close()


def finish_all(processes: Sequence["subprocess.Popen[str]"]) -> list[FioResult]:
    """Wait for all; see `run_fio`.  If one fails, the others are ended."""
    try:
        return [finish_fio(each) for each in processes]
    finally:
        for each in processes:
            drop_fio(each)


def finish_fio(process: "subprocess.Popen[str]", may_fail: bool = False) -> FioResult:
    """Wait for fio; see `run_fio`."""
    try:
        output, _ = process.communicate(timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        drop_fio(process)
        raise
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
