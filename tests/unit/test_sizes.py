"""Sizes as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ublkpool.bufpool.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("0", 0), ("4096", 4096), ("1K", 1024), ("1.5G", 1610612736), ("64MiB", 64 << 20), (" 2 tb ", 2 << 40)],
)
def test_sizes_as_people_write_them_are_parsed(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "12Q", "-1", "1.5", "0x10", "K", "1e3", "\uff11K"])
def test_a_text_that_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a"):
        parse_size(text)


@given(st.integers(0, 1023), st.integers(0, 5))
def test_round_sizes_survive_formatting(number: int, power: int) -> None:
    assert parse_size(format_size(number << 10 * power)) == number << 10 * power


@pytest.mark.parametrize(
    ("size_bytes", "text"), [(0, "0"), (1000, "1000"), (1536, "1.5K"), (7 << 60, "7E"), (10**12, "931.32G")]
)
def test_formats_for_people(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text
