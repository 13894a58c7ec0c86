"""Atomic loads and stores in memory that tests share with concurrent code."""

import mmap
import os
import signal

from support.fakes.shared_words import load_word, store_word

LOOKS = 200_000
STOP = 64


def _write_in_turns(memory: mmap.mmap, at: int, values: tuple[int, int]) -> None:
    while not load_word(memory, STOP):
        for value in values:
            store_word(memory, at, value)


def test_a_concurrent_reader_sees_only_whole_numbers() -> None:
    values = (0x0000FFFF, 0x00010000)
    with mmap.mmap(-1, mmap.PAGESIZE) as memory:
        store_word(memory, 4, values[0])
        child = os.fork()
        if child == 0:
            try:
                _write_in_turns(memory, 4, values)
            finally:
                os._exit(0)
        try:
            seen = {load_word(memory, 4) for _ in range(LOOKS)}
            store_word(memory, STOP, 1)
            assert os.waitpid(child, 0)[1] == 0
        except BaseException:
            os.kill(child, signal.SIGKILL)
            raise
    assert seen <= set(values)


def test_numbers_are_stored_modulo_32_bits_and_change_no_neighbour() -> None:
    with mmap.mmap(-1, mmap.PAGESIZE) as memory:
        store_word(memory, 8, -1)
        assert load_word(memory, 8) == 0xFFFFFFFF
        assert memory[:8] == bytes(8) and memory[12:20] == bytes(8)
