"""Builds `ublkpool.bufpool._fileio`, the SDK's native part, with cffi; run as a script it builds in place.

Runs at build time only.  The headers are the one description of the interface: its declarations are read from them.
"""

import re
from pathlib import Path
from runpy import run_path

from cffi import FFI

_BUFPOOL = Path(__file__).parent.resolve()
_HEADERS = ("wire.h", "engine.h", "calls.h", "file_facts.h", "port.h", "ring_loop.h")
_SOURCES = (
    "engine.c",
    "engine_answers.c",
    "engine_regions.c",
    "slots.c",
    "own_ring.c",
    "storage_null.c",
    "storage_file.c",
    "storage_memory.c",
    "calls.c",
    "file_facts.c",
    "port.c",
    "ring_loop.c",
)

_ASKED_OF_PYTHON = """
extern "Python" int64_t calls_place(void *handle, int is_write, uint64_t offset, uint64_t length, uint32_t flags);
extern "Python" void calls_released(void *handle, uint64_t region);
"""
"""What `calls.c` calls, see there."""


def declarations(header: str) -> str:
    """What cffi has to know of a header: no comments, no preprocessor."""
    return re.sub(r"/\*.*?\*/|^#.*?$", "", header, flags=re.DOTALL | re.MULTILINE)


ffibuilder = FFI()
for header in _HEADERS:
    ffibuilder.cdef(declarations((_BUFPOOL / "csrc" / header).read_text()))
ffibuilder.cdef(_ASKED_OF_PYTHON)
ffibuilder.set_source(
    "ublkpool.bufpool._fileio",
    # Included rather than listed as a source: object files of sources outside the build folder land beside it.
    "".join(f'#include "{source}"\n' for source in _SOURCES),
    include_dirs=[str(_BUFPOOL / "csrc")],
    # By the paths that the source distribution has as well.
    depends=[f"src/ublkpool/bufpool/csrc/{each.name}" for each in sorted((_BUFPOOL / "csrc").glob("*.[ch]"))],
    libraries=run_path(str(_BUFPOOL / "_liburing_build.py"))["LIBRARIES"],
    # Hidden: what nobody else calls can be inlined.
    extra_compile_args=[
        "-std=gnu11",
        "-O2",
        "-fvisibility=hidden",
        "-Wall",
        # An error for the compiler of Debian 13, so an error everywhere.
        "-Werror=implicit-function-declaration",
        "-Wextra",
        "-Wno-unused-parameter",
    ],
)

if __name__ == "__main__":
    # The module's name is ublkpool.bufpool._fileio and src/ublkpool/bufpool leads back to this folder.
    ffibuilder.compile(tmpdir=str(_BUFPOOL.parent / "src"), verbose=True)
