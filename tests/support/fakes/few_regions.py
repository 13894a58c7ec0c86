"""A backend with four regions for reads, so that most requests of a burst wait for a released region."""

from ublkpool.bufpool.sdk.backend import Backend, Hint, NoOptions, Properties

REGIONS = 4
REGION_BYTES = 4096
SIZE_BYTES = 64 << 20


class FewRegions(Backend):
    """Zeros, 4096 bytes at a time."""

    def __init__(self, options: NoOptions) -> None:
        super().__init__(options)
        self._free = [number * REGION_BYTES for number in range(REGIONS)]

    def open(self, hint: Hint) -> Properties:
        return Properties(
            size_bytes=SIZE_BYTES,
            logical_block_bytes=REGION_BYTES,
            read_buffers="own",
            segment_bytes=REGIONS * REGION_BYTES,
        )

    def read_in_place(self, offset: int, length: int) -> int | None:
        return self._free.pop() if self._free else None

    def released(self, region: int) -> None:
        self._free.append(region)

    def pread(self, buf: memoryview, offset: int) -> None:
        """The region is full of zeros."""

    def pwrite(self, buf: memoryview, offset: int, fua: bool) -> None:
        """Nothing is kept."""
