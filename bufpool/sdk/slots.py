"""Equal slots of a backend's own segment, for backends that do not care where a write lands.

Owns the list of free slots.  Used on the loop's thread.
"""


class Slots:
    """Hands out the byte offsets of slots; `align_bytes` rounds `slot_bytes` up."""

    def __init__(self, segment_bytes: int, slot_bytes: int, align_bytes: int = 4096) -> None:
        self.slot_bytes = -(-slot_bytes // align_bytes) * align_bytes
        self.count = segment_bytes // self.slot_bytes
        self._free = [index * self.slot_bytes for index in reversed(range(self.count))]

    def take(self) -> int | None:
        """The byte offset of a free slot, None if all are taken."""
        return self._free.pop() if self._free else None

    def give(self, offset: int) -> None:
        """Give back a slot that `take` handed out."""
        self._free.append(offset)
