"""The texts that nbdkit reads for its plugins: sizes, probabilities, delays, passwords.

The same texts are valid, with the same values, as for the functions of nbdkit with these names (server/public.c and
common/include/human-size.h).  Every function raises `TypeError` for an argument of another type and `ValueError` for
another text.
"""

import getpass
import math
import os
import re
from pathlib import Path

_SIZE_MAX = (1 << 63) - 1
_SIZE = re.compile(r"\s*(\+?[0-9]+)([bkmgtpes]?)", re.IGNORECASE)
_SCALES = {"": 1, "b": 1, "s": 512, **{letter: 1024**power for power, letter in enumerate("kmgtpe", 1)}}
_NUMBER = r"\s*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)"
_RATIO = re.compile(rf"{_NUMBER}[:/]{_NUMBER}")
_PROBABILITY = re.compile(rf"{_NUMBER}(%?)")
_DELAY = re.compile(rf"{_NUMBER}(s|ms|us|μs|ns)?")
_UNITS_NS = {"s": 10**9, "ms": 10**6, "us": 10**3, "μs": 10**3, "ns": 1}
_STANDARD_FILES = 3


def parse_size(text: str, /) -> int:
    """512, 7k, 17M or 8s (sectors of 512 bytes) in bytes; k, M, G, T, P and E are powers of 1024."""
    found = _SIZE.fullmatch(_string("parse_size", text))
    size_bytes = int(found[1]) * _SCALES[found[2].lower()] if found else -1
    if not 0 <= size_bytes <= _SIZE_MAX:
        raise ValueError("Unable to parse string as size")
    return size_bytes


def parse_probability(what: str, text: str, /) -> float:
    """0.1, 10%, 1:10 or 1/10 as a number that is not negative; `what` names the parameter."""
    _string("parse_probability", what)
    value = _probability(_string("parse_probability", text))
    if value is None or not math.isfinite(value) or math.copysign(1, value) < 0:
        raise ValueError("Unable to parse string as probability")
    return value


def _probability(text: str) -> float | None:
    if ratio := _RATIO.fullmatch(text):
        part, whole = float(ratio[1]), float(ratio[2])
        if whole:
            return part / whole
        return None if part else part
    if found := _PROBABILITY.fullmatch(text):
        return float(found[1]) / (100 if found[2] else 1)
    return None


def parse_delay(what: str, text: str, /) -> tuple[int, int]:
    """1.5, 10ms, 3us or 7ns as (seconds, nanoseconds); `what` names the parameter."""
    _string("parse_delay", what)
    found = _DELAY.fullmatch(_string("parse_delay", text))
    value = float(found[1]) if found else math.nan
    if found is None or not math.isfinite(value) or math.copysign(1, value) < 0:
        raise ValueError("Unable to parse string as delay")
    return divmod(round(value * _UNITS_NS[found[2] or "s"]), 10**9)


def read_password(value: str, /) -> bytes:
    """The password: asked for (-), the first line of a file (+FILE) or of a descriptor (-FD), or `value` itself."""
    _string("read_password", value)
    try:
        if value == "-":
            return getpass.getpass("password: ").encode()
        if value.startswith("+"):
            return _first_line(Path(value[1:]).read_bytes())
        if value.startswith("-"):
            return _first_line(_read_descriptor(int(value[1:])))
    except (OSError, ValueError) as error:
        raise ValueError(f"Unable to parse parameter as a password: {error}") from error
    return value.encode()


def _read_descriptor(descriptor: int) -> bytes:
    if descriptor < _STANDARD_FILES:
        raise ValueError("a password cannot be read from stdin, stdout or stderr")
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def _first_line(content: bytes) -> bytes:
    return content.partition(b"\n")[0]


def _string(function: str, value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{function}() argument must be str, not {type(value).__name__}")
    return value
