"""The chunks that were used last, in memory.  Pure."""

from collections import OrderedDict


class MemoryCache:
    """Whole chunks by index; the ones used least recently are dropped."""

    def __init__(self, bytes_max: int) -> None:
        """At least one chunk is kept, however small the bound."""
        self._chunks: OrderedDict[int, bytes] = OrderedDict()
        self._bytes_max, self._bytes = bytes_max, 0

    def get(self, index: int) -> bytes | None:
        """The chunk, or None."""
        found = self._chunks.get(index)
        if found is not None:
            self._chunks.move_to_end(index)
        return found

    def put(self, index: int, data: bytes) -> None:
        """Keep a chunk, in place of an earlier one of this index."""
        self.drop(index)
        self._chunks[index] = data
        self._bytes += len(data)
        while self._bytes > self._bytes_max and len(self._chunks) > 1:
            _, dropped = self._chunks.popitem(last=False)
            self._bytes -= len(dropped)

    def drop(self, index: int) -> None:
        """Forget a chunk."""
        dropped = self._chunks.pop(index, None)
        if dropped is not None:
            self._bytes -= len(dropped)
