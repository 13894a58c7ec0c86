"""Equal slots of a backend's own segment, for backends that only need somewhere for a write to land.

Owns which slot is free.  Used by one thread, the backend's loop.
"""


class Slots:
    """Hands out byte offsets of slots; each is lent once until it is given back."""

    def __init__(self, segment_bytes: int, slot_bytes: int, align_bytes: int = 4096) -> None:
        self.slot_bytes = -(-slot_bytes // align_bytes) * align_bytes
        self.count = segment_bytes // self.slot_bytes
        self._free = [index * self.slot_bytes for index in reversed(range(self.count))]

    def take(self) -> int | None:
        """A free slot's byte offset, None if all are lent."""
        return self._free.pop() if self._free else None

    def give(self, offset: int) -> None:
        """Return a slot that `take` handed out."""
        self._free.append(offset)
