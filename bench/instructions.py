"""Instructions of the queue core per request, counted by callgrind; the count is the same each time.

A small C program (`csrc/queue_cost.c`) stands in for the ring and the backend.  Only its calls into the core
count, with all further calls from there: an engine inside the worker counts too.  The difference of two runs of
different length leaves out the start.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import msgspec

CASES = {
    "write-pool": "write, need_get_data, placement pool",
    "write-backend": "write, need_get_data, placement backend",
    "write-posted": "write, need_get_data, posted ahead by the backend",
    "write-lent": "write, need_get_data off",
    "read-pool": "read into a pool buffer",
    "read-own": "read from the backend's own memory",
    "write-alone": "write, need_get_data, answered by the worker",
    "read-alone": "read, answered by the worker",
    "flush": "flush",
    "discard": "discard",
}
TRANSPORTS = ("frames", "rings", "inside")
_NOT_INSIDE = frozenset({"write-posted", "write-lent", "write-alone", "read-alone"})
"""Cases without an engine, or without the NEED_GET_DATA that an engine inside has."""
BATCHES = (1, 32, 128, 1024)
_REQUESTS = 3200
_ROUNDS_MAX = 100
_HERE = Path(__file__).resolve().parent
_CORE = _HERE.parent / "ublk" / "csrc"
_SHARED = _HERE.parent / "bufpool" / "wire" / "csrc"
_ENGINE = _HERE.parent / "bufpool" / "engine" / "csrc"
_ENGINE_FILES = (
    "engine.c",
    "engine_answers.c",
    "engine_regions.c",
    "engine_inside.c",
    "slots.c",
    "storage_null.c",
    "storage_memory.c",
)
# All of the core except its io_uring.
_NOT_COUNTED = "queue_ring.c"
# As ublk/_native_build.py compiles them.
_FLAGS = ("-g", "-std=gnu11", "-D_GNU_SOURCE", "-O2", "-Wall", "-Wextra", "-Wno-unused-parameter")
_WHOLE = ("-flto", "-fvisibility=hidden", "-r", "-flinker-output=nolto-rel")
_INCLUDES = tuple(word for each in (_CORE, _SHARED, _ENGINE) for word in ("-I", str(each)))
_HARNESS = "queue_cost.c"


class CostError(Exception):
    """The core's cost cannot be counted; the text is one line."""


class InstructionCost(msgspec.Struct, frozen=True):
    """Instructions per request of a case, with this number of requests at a time."""

    case: str
    transport: str
    batch: int
    instructions: float


def count_instructions() -> list[InstructionCost]:
    """Compile, run and count every case.  Raises `CostError`."""
    with tempfile.TemporaryDirectory(prefix="ublkpool-cost-") as directory:
        program = Path(directory) / "queue_cost"
        core = sorted(each for each in _CORE.glob("queue_*.c") if each.name != _NOT_COUNTED)
        engine = [_ENGINE / name for name in _ENGINE_FILES]
        modules = [_module(program.with_name("core.o"), core), _module(program.with_name("engine.o"), engine)]
        _run(["gcc", *_FLAGS, *_INCLUDES, "-o", program, _HERE / "csrc" / _HARNESS, *modules])
        return [
            _cost(program, case, transport, batch)
            for case in CASES
            for transport in TRANSPORTS
            if transport != "inside" or case not in _NOT_INSIDE
            for batch in BATCHES
        ]


def _module(out: Path, sources: list[Path]) -> Path:
    """One object file, linked as a whole like a native module."""
    _run(["gcc", *_FLAGS, *_WHOLE, *_INCLUDES, "-o", out, *sources])
    return out


def _cost(program: Path, case: str, transport: str, batch: int) -> InstructionCost:
    words = (case, transport, str(batch))
    rounds = min(_ROUNDS_MAX, _REQUESTS // batch)
    short, long = (_counted(program, *words, str(count)) for count in (rounds, 2 * rounds))
    return InstructionCost(case, transport, batch, (long - short) / (rounds * batch))


def _counted(program: Path, *words: str) -> int:
    out = program.with_suffix(".callgrind")
    valgrind = ["valgrind", "-q", "--tool=callgrind", f"--callgrind-out-file={out}"]
    uncompressed = ["--compress-strings=no", "--compress-pos=no"]
    _run([*valgrind, *uncompressed, program, *words])
    return core_instructions(out.read_text(), _HARNESS)


def _run(command: list[str | Path]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise CostError(f"{command[0]} is missing: `make bench-host` installs it") from None
    if done.returncode:
        said = " ".join(done.stderr.split())[-300:]
        raise CostError(f"{Path(command[0]).name} ended with {done.returncode}: {said}")


def core_instructions(profile: str, harness: str) -> int:
    """The instructions of every call that functions of the file `harness` make into the core (`uq_*`)."""
    total = 0
    ours = into_core = False
    lines = iter(profile.splitlines())
    for line in lines:
        if match := re.match(r"(fl|cfn)=(.*)", line):
            if match.group(1) == "fl":
                ours = match.group(2).endswith(f"/{harness}")
            else:
                into_core = match.group(2).startswith("uq_")
        elif line.startswith("calls="):
            cost = next(lines).split()
            total += int(cost[1]) if ours and into_core else 0
    return total
