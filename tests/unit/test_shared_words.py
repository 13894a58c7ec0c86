"""The numbers that tests share with code that runs beside them."""

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


def test_a_reader_beside_a_writer_sees_whole_numbers_only() -> None:
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


def test_numbers_are_kept_modulo_32_bits_and_touch_nothing_beside_them() -> None:
    with mmap.mmap(-1, mmap.PAGESIZE) as memory:
        store_word(memory, 8, -1)
        assert load_word(memory, 8) == 0xFFFFFFFF
        assert memory[:8] == bytes(8) and memory[12:20] == bytes(8)
