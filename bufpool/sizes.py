"""Sizes as people write them: `64M`, `1.5G`, `4096`.  Pure; powers of 1024, results in whole bytes."""

import re
from typing import Annotated

_UNITS = "KMGTPE"
_SIZE = re.compile(r"(\d+)(?:\.(\d+))?\s*([KMGTPE]?)(?:I?B)?", re.IGNORECASE | re.ASCII)


ByteSize = Annotated[int, "written as a size"]
"""The type of an option that is written as a size; an integer, which the options parser knows by this name."""


def parse_size(text: str) -> int:
    """Bytes meant by `text`.  Raises `ValueError` with a line that says what a size looks like."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size (write 4096, 64M or 1.5G)")
    whole, decimals, unit = match.groups(default="")
    unit_bytes = 1 << 10 * (_UNITS.index(unit.upper()) + 1 if unit else 0)
    parts: int = 10 ** len(decimals)
    size_bytes, rest = divmod(int(whole + decimals) * unit_bytes, parts)
    if rest:
        raise ValueError(f"{text!r} is not a whole number of bytes")
    return size_bytes


def format_size(size_bytes: int) -> str:
    """`size_bytes` for people, rounded to two decimals: `1.5G`.  Sizes that people choose survive `parse_size`."""
    power = 0
    while power < len(_UNITS) and abs(size_bytes) >= 1024 ** (power + 1):
        power += 1
    if power == 0:
        return str(size_bytes)
    return f"{size_bytes / 1024**power:.2f}".rstrip("0").rstrip(".") + _UNITS[power - 1]
