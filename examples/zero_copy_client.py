"""A program that does direct I/O from memory that it shares with the disk's backend, so that no data is copied.

ublkpool add vol0 --size 1G --backend memory --client-buffers 64M
/opt/ublkpool/bin/python examples/zero_copy_client.py vol0
"""

import os
import sys
from pathlib import Path

from ublkpool.bufpool.sdk.client_buffers import ClientBuffer

BLOCK = 65536


def main(device: str, run_dir: str = "/run/ublkpool") -> None:
    """Write a few blocks, read them back, say how."""
    with ClientBuffer.open(device, run_dir=Path(run_dir)) as buffer:
        disk = os.open(buffer.path, os.O_RDWR | os.O_DIRECT)
        out, back = buffer.view[:BLOCK], buffer.view[BLOCK : 2 * BLOCK]
        for number in range(4):
            out[:] = bytes([number]) * BLOCK
            os.pwritev(disk, [out], number * BLOCK)
            os.preadv(disk, [back], number * BLOCK)
            assert back == out
        os.close(disk)
        out.release()
        back.release()
        print("in place" if buffer.is_shared else "copied")


if __name__ == "__main__":
    main(*sys.argv[1:])
