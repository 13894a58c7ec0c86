"""Every wrong answer that a backend can send, with the worker's required reaction.

A wrong answer is a change to the correct answer of a request that is being served or placed.  `CUT` ones end the link,
`STALE` ones are dropped and counted, and only those of `lies_about` may make their own request fail.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

from ublkpool.bufpool.wire import DESCRIPTORS_PER_FRAME_MAX, Descriptor, Flag, Kind, Op


class Scene(NamedTuple):
    """The facts for a wrong answer: a request, the backend's segment, and the device."""

    request: Descriptor
    segment: int
    segment_bytes: int
    block_bytes: int
    depth: int
    rng: random.Random

    def done(self, result: int = 0) -> Descriptor:
        return self.request.answer(Kind.DONE, result)

    def placed(self, buffer: int = 0) -> Descriptor:
        answer = self.request.answer(Kind.PLACED)
        return answer._replace(segment=self.segment, buffer=buffer)

    def answer(self) -> Descriptor:
        """A correct answer to the request."""
        return self.placed() if self.request.kind == Kind.PLACE else self.done()

    def region(self, buffer: int, segment: int | None = None) -> Descriptor:
        """An answer that names a region for this request: PLACED for a write, DONE for a read."""
        named = self.placed() if self.request.kind == Kind.PLACE else self.done(self.block_bytes)
        return named._replace(
            flags=Flag.REGION if named.kind == Kind.DONE else 0,
            segment=self.segment if segment is None else segment,
            buffer=buffer,
        )


Lie = Callable[[Scene], bytes]


def _field(name: str, change: Callable[[Scene], int]) -> Lie:
    return lambda scene: scene.answer()._replace(**{name: change(scene)}).pack()


def _random_bytes(scene: Scene) -> bytes:
    garbage = bytearray(scene.rng.randbytes(64 * scene.rng.randint(1, 3)))
    garbage[4] |= 0x80
    return bytes(garbage)


def _other_kind(scene: Scene) -> bytes:
    other = Kind.DONE if scene.request.kind == Kind.PLACE else Kind.PLACED
    return scene.request.answer(other).pack()


CUT: dict[str, Lie] = {
    "empty frame": lambda scene: b"",
    "torn frame": lambda scene: scene.answer().pack()[: scene.rng.randint(1, 63)],
    "huge frame": lambda scene: scene.answer().pack() * (DESCRIPTORS_PER_FRAME_MAX + 1),
    "random bytes": _random_bytes,
    "unknown kind": _field("kind", lambda scene: scene.rng.choice((0, 1, 6, 15, 20, 32, 255))),
    "second hello": _field("kind", lambda scene: Kind.HELLO),
    "other kind": _other_kind,
    "foreign device": _field("device", lambda scene: scene.request.device + 1),
    "foreign queue": _field("queue", lambda scene: 999),
    "no such tag": _field("tag", lambda scene: scene.depth + scene.rng.randint(0, 9)),
    "future epoch": _field("epoch", lambda scene: scene.request.epoch + 1),
    "future sequence": _field("sequence", lambda scene: scene.request.sequence + scene.rng.randint(1, 9999)),
}
STALE: dict[str, Lie] = {
    "old epoch": _field("epoch", lambda scene: scene.rng.randrange(scene.request.epoch)),
    "old sequence": _field("sequence", lambda scene: scene.rng.randrange(scene.request.sequence)),
}
REGIONS: dict[str, Lie] = {
    "past the end": lambda scene: scene.region(scene.segment_bytes).pack(),
    "half past the end": lambda scene: scene.region(scene.segment_bytes - scene.request.length + 512).pack(),
    "overflow": lambda scene: scene.region((1 << 64) - scene.block_bytes).pack(),
    "misaligned": lambda scene: scene.region(1 + scene.rng.randrange(510)).pack(),
    "the pool": lambda scene: scene.region(0, segment=1).pack(),
    "no segment": lambda scene: scene.region(0, segment=0).pack(),
    "a dead segment": lambda scene: scene.region(0, segment=scene.segment - 1).pack(),
    "foreign segment": lambda scene: scene.region(0, segment=77777).pack(),
}
RESULTS: dict[str, Lie] = {
    "too large": lambda scene: scene.done(scene.request.length + scene.block_bytes).pack(),
    "too large an errno": lambda scene: scene.done(-4096 - scene.rng.randrange(1 << 30)).pack(),
    "no whole block": lambda scene: scene.done(scene.rng.choice((1, 511, 513))).pack(),
}
REJECTS: dict[str, Lie] = {
    "positive reject": lambda scene: scene.request.answer(Kind.REJECT, scene.rng.randrange(1 << 20)).pack(),
}


def posts_that_lie(true: Descriptor, segment_bytes: int, block_bytes: int) -> dict[str, Descriptor]:
    """Posts that are invalid whatever the segment contains."""
    return {
        "past the end": true._replace(buffer=segment_bytes),
        "half past the end": true._replace(buffer=segment_bytes - true.length + block_bytes),
        "overflow": true._replace(buffer=(1 << 64) - block_bytes),
        "misaligned": true._replace(buffer=true.buffer + 1),
        "the pool": true._replace(segment=1),
        "no segment": true._replace(segment=0),
        "a dead segment": true._replace(segment=true.segment - 1),
        "no size that buffers have": true._replace(length=true.length + block_bytes),
        "nothing": true._replace(length=0),
        "a size that overflows": true._replace(length=(1 << 64) - block_bytes),
        "foreign device": true._replace(device=true.device + 1),
        "future epoch": true._replace(epoch=true.epoch + 1),
    }


def lies_about(request: Descriptor) -> dict[str, Lie]:
    """Wrong answers that cut the link and may make the request fail."""
    if request.kind == Kind.PLACE:
        return REGIONS | REJECTS
    if request.op == Op.READ:
        return REGIONS | RESULTS
    return RESULTS
