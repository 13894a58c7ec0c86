"""Loads and stores 32-bit numbers in shared memory atomically.

`struct` with a byte order in its format moves a number byte by byte, so that another process or thread may see half of
one.  A view of native 32-bit numbers copies four bytes at once: one instruction if the address is a multiple of four.
"""

import mmap

_MASK = 0xFFFFFFFF


def load_word(memory: mmap.mmap, at: int) -> int:
    """The number at byte `at`, a multiple of four."""
    with memoryview(memory) as view, view.cast("I") as words:
        return words[at // 4]


def store_word(memory: mmap.mmap, at: int, value: int) -> None:
    """Store the number, modulo 2^32, at byte `at`, a multiple of four."""
    with memoryview(memory) as view, view.cast("I") as words:
        words[at // 4] = value & _MASK
