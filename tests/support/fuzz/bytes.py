"""Mutations of a valid message."""

import random

TOKENS = (
    b'"',
    b"{",
    b"}",
    b"[" * 2000,
    b"\\",
    b"null",
    b"-1",
    b"1e999",
    b"9" * 30,
    b"\x00",
    b"\xff",
    b"\xed\xa0\x80",
    b'"type":',
    b"\n",
)
PLACES = ("flip", "insert", "cut", "double", "drop", "noise")


def spoil(rng: random.Random, message: bytes) -> bytes:
    """The message with up to three changes."""
    found = bytearray(message)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        _change(rng, found)
    return bytes(found)


def _change(rng: random.Random, found: bytearray) -> None:
    at, end = sorted((int(rng.random() * (len(found) + 1)), int(rng.random() * (len(found) + 1))))
    match PLACES[int(rng.random() * len(PLACES))]:
        case "flip" if at < len(found):
            found[at] ^= 1 << int(rng.random() * 8)
        case "insert":
            found[at:at] = TOKENS[int(rng.random() * len(TOKENS))]
        case "cut":
            del found[at:]
        case "double":
            found[at:at] = found[at:end]
        case "drop":
            del found[at:end]
        case _:
            found[at:at] = rng.randbytes(1 + int(rng.random() * 8))
