"""Builds `ublkpool.ublk._native`: the queue's hot path, its ring and the control commands, through cffi's API mode.

The declarations are the headers themselves, so that there is one place where a signature is written.
"""

import re
from pathlib import Path
from runpy import run_path

from cffi import FFI

_SOURCES = Path(__file__).resolve().parent / "csrc"
# bufpool's: what both ends of a link must agree on is written once.
_BUFPOOL = _SOURCES.parents[1] / "bufpool"
_SHARED = _BUFPOOL / "wire" / "csrc"
_HEADERS = (
    "wire.h",
    "engine_calls.h",
    "queue_latency.h",
    "queue_core.h",
    "queue_port.h",
    "queue_inside.h",
    "queue_clock.h",
    "queue_ring.h",
    "mappings.h",
    "control.h",
    "fork_asked.h",
    "fetch_round.h",
)


def _declarations(name: str) -> str:
    """A header in the C that cffi parses: no preprocessor lines, no asserts, fixed enum arithmetic left to C."""
    directory = _SOURCES if (_SOURCES / name).exists() else _SHARED
    text = (directory / name).read_text()
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    text = re.sub(r"_Static_assert\(.*?\);", "", text)
    text = text.replace("UQ_BUFFER_NONE = 0xffffffffu,", "")
    return "\n".join(line for line in text.splitlines() if not line.startswith("#"))


# Hidden and linked as one, functions of one file are inlined into another's.
_WHOLE = ["-O2", "-flto", "-fvisibility=hidden"]
_SOURCE_FILES = (
    "queue_latency.c",
    "queue_tag.c",
    "queue_check.c",
    "queue_stock.c",
    "queue_region.c",
    "queue_limit.c",
    "queue_descriptor.c",
    "queue_finish.c",
    "queue_run.c",
    "queue_request.c",
    "queue_waiting.c",
    "queue_link.c",
    "queue_time.c",
    "queue_core.c",
    "queue_port.c",
    "queue_inside.c",
    "queue_clock.c",
    "queue_ring.c",
    "mappings.c",
    "control.c",
    "fork_asked.c",
    "fetch_round.c",
)


_common = run_path(str(_BUFPOOL / "_common_build.py"))


def _builder(module: str, *options: str) -> FFI:
    builder = FFI()
    builder.cdef("\n".join(_declarations(name) for name in _HEADERS))
    builder.set_source(
        f"ublkpool.ublk.{module}",
        "".join(f'#include "{name}"\n' for name in _HEADERS),
        # By the paths that the source distribution has as well.
        sources=[f"src/ublkpool/ublk/csrc/{name}" for name in _SOURCE_FILES],
        include_dirs=["src/ublkpool/ublk/csrc", "src/ublkpool/bufpool/wire/csrc"],
        libraries=_common["LIBRARIES"],
        extra_compile_args=[*_WHOLE, "-std=gnu11", "-D_GNU_SOURCE", *_common["WARNINGS"], *options],
        extra_link_args=_WHOLE,
    )
    return builder


ffibuilder = _builder("_native")
# The core asserts its invariants after each call: for unit tests and simulation, never installed by users.
checked = _builder("_native_checked", "-DUQ_CHECKED")

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
