"""The command that brings a file or disk to the content that a trace of the layer `log` describes.

    python -m ublkpool.bufpool.sdk.layers.replay TRACE TARGET

Executes what TRACE says was done with success, in the same order, on TARGET: a file, which is made, or a disk.  What
was there is overwritten.  Reads are compared with what they returned then.  Exit status: 0 done, 1 a read differs or
the target failed, 2 TRACE is none.
"""

import sys
from pathlib import Path

from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk.layers.trace import replay


def main(arguments: list[str]) -> int:
    """Replay, print what was done, return the exit status."""
    if len(arguments) != 2:
        print("usage: python -m ublkpool.bufpool.sdk.layers.replay TRACE TARGET", file=sys.stderr)
        return 2
    try:
        done = replay(*map(Path, arguments))
    except (BackendError, OSError) as error:
        print(f"replay: {error}", file=sys.stderr)
        return 2 if isinstance(error, BackendError) else 1
    print(f"{done.writes} writes executed, {done.reads} reads compared, {done.different} differ")
    return 1 if done.different else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
