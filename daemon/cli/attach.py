"""The commands whose own process attaches to a device: `backend` serves it, `client` uses its shared memory."""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ublkpool.daemon.cli.options import layer_option, parse_pairs, run_dir_option

if TYPE_CHECKING:
    from ublkpool.bufpool.sdk.client import Transport
    from ublkpool.daemon.settings.config import LogFormat, LogLevel


@click.command(short_help="Serve a device as its backend.")
@click.argument("kind", metavar="KIND|FILE.py")
@click.argument("options", nargs=-1, metavar="[KEY=VALUE ...]")
@click.option("--device", required=True, metavar="NAME", help="The device to attach to.")
@click.option(
    "--transport",
    type=click.Choice(["auto", "ring", "zeromq"]),
    default="auto",
    metavar="auto|ring|zeromq",
    help="How requests travel: rings in shared memory if the device offers them, only rings, or ZeroMQ frames.  "
    "[default: auto]",
)
@click.option(
    "--log-format",
    type=click.Choice(["auto", "human", "logfmt", "json"]),
    default="auto",
    metavar="auto|human|logfmt|json",
    help="Format of the log on stderr; auto is human on a terminal or in the journal, else logfmt.  [default: auto]",
)
@layer_option
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    metavar="debug|info|warning|error",
    help="Log this level and above, of your own loggers too.  [default: info]",
)
@run_dir_option()
def backend(
    kind: str,
    options: tuple[str, ...],
    device: str,
    transport: "Transport",
    log_format: "LogFormat",
    log_level: "LogLevel",
    layers: tuple[str, ...],
    run_dir: Path,
) -> int:
    """Serve a device as its backend, in this process, until the device is deleted or SIGTERM.

    KIND is a built-in backend, such as null, memory or file; FILE.py is one of your own.

    \b
    ublkpool backend file --device vol0 path=/var/lib/vol0.img
    ublkpool backend ./mybackend.py --device vol1 colour=blue
    ublkpool backend check ./mybackend.py colour=blue           judges its promises, without a device
    ublkpool backend memory --device vol2 --layer log:file=trace --layer fault:seed=1,eio=0.01
    """
    pairs = parse_pairs(options)
    from ublkpool.bufpool.sdk.loader import run_backend
    from ublkpool.daemon import logs, printed

    logs.configure(log_level, log_format, all_loggers=True)
    printed.show_at_once()
    run = partial(run_backend, layers=layers) if layers else run_backend
    return run(kind, pairs, device, run_dir, transport=transport)


@click.command(
    short_help="Run a program with a zero-copy I/O buffer.", context_settings={"ignore_unknown_options": True}
)
@click.argument("name")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="COMMAND...")
@run_dir_option()
def client(name: str, command: tuple[str, ...], run_dir: Path) -> None:
    """Run COMMAND with an I/O buffer that it shares with the backend of the disk NAME: I/O through it is not copied.

    COMMAND finds the disk's path in UBLKPOOL_DISK, the buffer's path (a file to map shared) in UBLKPOOL_BUFFER, and the
    buffer's size in UBLKPOOL_BUFFER_BYTES.  Only direct I/O is not copied.  If the device has no such memory
    (--client-buffers, SHMEM_ZC in `ublkpool features`), the buffer is an ordinary file and I/O through it is copied.

    \b
    ublkpool client vol0 -- sh -c 'fio --name=a --filename=$UBLKPOOL_DISK --direct=1 --rw=write --bs=512k \\
        --ioengine=io_uring --iodepth=8 --size=1G --iomem=mmapshared:$UBLKPOOL_BUFFER'
    """
    from ublkpool.bufpool.sdk.client_buffers import ClientBuffer

    buffer = ClientBuffer.open(name, run_dir=run_dir)
    buffer.leave_open()
    os.environ["UBLKPOOL_DISK"] = buffer.path
    os.environ["UBLKPOOL_BUFFER"] = f"/proc/self/fd/{buffer.descriptor}"
    os.environ["UBLKPOOL_BUFFER_BYTES"] = str(buffer.size_bytes)
    os.execvp(command[0], command)
