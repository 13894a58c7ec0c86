"""Builds `ublkpool.bufpool.engine._engine`, the SDK's native part, with cffi; run as a script it builds in place.

Runs at build time only.  The headers are the one description of the interface: its declarations are read from them.
"""

import re
from pathlib import Path
from runpy import run_path

from cffi import FFI

_ENGINE = Path(__file__).parent.resolve()
_BUFPOOL = _ENGINE.parent
# The engine's own first; what both ends of a link must agree on is the wire's.
_FOLDERS = (_ENGINE / "csrc", _BUFPOOL / "wire" / "csrc")
_HEADERS = (
    "wire.h",
    "engine_calls.h",
    "engine.h",
    "calls.h",
    "cow_map.h",
    "storage_rbd.h",
    "boot_timer.h",
    "file_facts.h",
    "port.h",
    "ring_loop.h",
)
_SOURCES = (
    "engine.c",
    "engine_answers.c",
    "engine_regions.c",
    "engine_inside.c",
    "slots.c",
    "own_ring.c",
    "storage_null.c",
    "storage_file.c",
    "cow_map.c",
    "cow_change.c",
    "cow_flush.c",
    "storage_cow.c",
    "storage_memory.c",
    "storage_rbd.c",
    "boot_timer.c",
    "calls.c",
    "file_facts.c",
    "port.c",
    "ring_loop.c",
)

_ASKED_OF_PYTHON = """
extern "Python+C" int64_t calls_place(void *handle, int is_write, uint64_t offset, uint64_t length, uint32_t flags);
extern "Python+C" void calls_released(void *handle, uint64_t region);
"""
"""Python functions that `calls.c` calls."""


def declarations(header: str) -> str:
    """The declarations of a header for cffi, without comments, preprocessor lines and assertions."""
    return re.sub(r"/\*.*?\*/|^#.*?$|^_Static_assert\(.*?\);", "", header, flags=re.DOTALL | re.MULTILINE)


_common = run_path(str(_BUFPOOL / "_common_build.py"))
ffibuilder = FFI()
for header in _HEADERS:
    ffibuilder.cdef(
        declarations(next(each / header for each in _FOLDERS if (each / header).exists()).read_text())
    )
ffibuilder.cdef(_ASKED_OF_PYTHON)
ffibuilder.set_source(
    "ublkpool.bufpool.engine._engine",
    # Included rather than listed as a source: object files of sources outside the build folder land beside it.
    "".join(f'#include "{source}"\n' for source in _SOURCES),
    include_dirs=[str(each) for each in _FOLDERS],
    # By the paths that the source distribution has as well.
    depends=[
        f"src/ublkpool/{each.relative_to(_BUFPOOL.parent)}"
        for folder in _FOLDERS
        for each in sorted(folder.glob("*.[ch]"))
    ],
    libraries=_common["LIBRARIES"],
    # Hidden, functions that are called only here can be inlined.
    extra_compile_args=[
        "-std=gnu11",
        "-O2",
        "-fvisibility=hidden",
        *_common["WARNINGS"],
    ],
)

if __name__ == "__main__":
    # The module's name is ublkpool.bufpool.engine._engine and src/ublkpool/bufpool leads back to bufpool/.
    ffibuilder.compile(tmpdir=str(_BUFPOOL.parent / "src"), verbose=True)
