"""A 32-bit number in memory that another process or thread reads at the same time: one load and one store.

`struct` with a byte order in its format moves a number byte by byte, so a reader beside it sees half of one.  A view
of native 32-bit numbers copies four bytes at once, which is one instruction where the address is a multiple of four.
"""

import mmap

_MASK = 0xFFFFFFFF


def load_word(memory: mmap.mmap, at: int) -> int:
    """The number at byte `at`, a multiple of four."""
    with memoryview(memory) as view, view.cast("I") as words:
        return words[at // 4]


def store_word(memory: mmap.mmap, at: int, value: int) -> None:
    """Put the number, modulo 2^32, at byte `at`, a multiple of four."""
    with memoryview(memory) as view, view.cast("I") as words:
        words[at // 4] = value & _MASK
