"""The options of `add` that describe a device; `settings.config` checks their values and has their defaults."""

from collections.abc import Callable
from functools import reduce
from typing import Any

import click

_Command = Callable[..., Any]

_OPTIONS = (
    click.option("--size", metavar="N", help="Bytes, or with K, M, G, T.  [default: the backend's size]"),
    click.option(
        "--queues", type=int, metavar="N", help="Hardware queues, one worker process each.  [default: 1]"
    ),
    click.option(
        "--depth", type=int, metavar="N", help="Requests in flight per queue, up to 4096.  [default: 128]"
    ),
    click.option("--id", type=int, metavar="N", help="The N of /dev/ublkbN.  [default: the kernel chooses]"),
    click.option("--max-io", metavar="N", help="Largest request, 4K to 32M.  [default: 512K]"),
    click.option(
        "--need-get-data/--no-need-get-data",
        default=None,
        help="Take a buffer when a write arrives, or lend one to each tag beforehand.  [default: when it arrives]",
    ),
    click.option(
        "--placement",
        metavar="pool|backend",
        help="Memory that a write's data lands in: a pool buffer, or memory that the backend names (needs "
        "--need-get-data).  [default: pool]",
    ),
    click.option(
        "--answers",
        metavar="backend|worker",
        help="Requests are answered by a backend, or by the workers, which store nothing and read zeros.  "
        "[default: backend]",
    ),
    click.option(
        "--recovery",
        metavar="reissue|abort|fail|none",
        help="After a worker's death: send its requests again, fail those it held, fail all until a new worker runs, "
        "or give the device up.  [default: reissue]",
    ),
    click.option("--read-only", is_flag=True, default=None, help="Refuse writes."),
    click.option(
        "--partitions/--no-partitions",
        default=None,
        help="Let the kernel scan for partitions at the start, or only on request (blockdev --rereadpt).  "
        "[default: at the start]",
    ),
    click.option(
        "--rings/--no-rings",
        default=None,
        help="Offer backends rings in shared memory, or only ZeroMQ frames.  [default: rings]",
    ),
    click.option(
        "--spin",
        type=int,
        metavar="US",
        help="Microseconds that a worker polls its rings before it sleeps, 0 to 1000.  "
        "[default: 20 from 16 CPUs on, else 0]",
    ),
    click.option("--pool", metavar="N", help="Bytes of the buffer pool.  [default: from queues and depth]"),
    click.option(
        "--huge-pages",
        metavar="auto|off|require",
        help="Pool memory in huge pages: as many as the kernel gives, none, or all or no device.  [default: auto]",
    ),
    click.option(
        "--affinity",
        metavar="auto|off|CPUS",
        help="CPU of each worker: one of its queue's CPUs, any, or one of a list such as 0-3,8.  [default: auto]",
    ),
    click.option(
        "--client-buffers",
        metavar="N",
        help="Bytes of memory that clients may use as I/O buffers, so that nothing is copied; see `client`.  "
        "[default: 0]",
    ),
    click.option(
        "--io-timeout",
        type=float,
        metavar="SECONDS",
        help="Time a backend has to answer a request.  [default: 30]",
    ),
    click.option(
        "--on-timeout",
        metavar="wait|fail",
        help="After --io-timeout a request keeps waiting, or fails with ETIMEDOUT.  [default: wait]",
    ),
    click.option(
        "--on-absent",
        metavar="wait|fail",
        help="While no backend is attached, requests wait for one, or fail after --absent-timeout.  [default: wait]",
    ),
    click.option(
        "--absent-timeout",
        type=float,
        metavar="SECONDS",
        help="Time that requests wait for a backend, with --on-absent fail.  [default: 60]",
    ),
    click.option(
        "--iops-max",
        type=int,
        metavar="N",
        help="Requests a second, reads and writes together, of all queues together.  [default: 0, no limit]",
    ),
    click.option(
        "--bytes-per-s-max",
        metavar="N",
        help="Bytes a second, read and written together, as in 100M; at least 64K.  [default: 0, no limit]",
    ),
    click.option(
        "--burst",
        type=float,
        metavar="SECONDS",
        help="After a pause, as much as the limits let through in this time passes at once.  [default: 0.1]",
    ),
    click.option(
        "--backend",
        metavar="KIND|FILE.py",
        help="Backend that the daemon runs for the device, with the KEY=VALUE options.",
    ),
    click.option(
        "--isolation",
        metavar="process|none",
        help="Run the backend in a process of its own, or the engine of null, memory, file, cow or rbd (these two: one "
        "queue) inside the device's workers: faster and smaller, and a crash of the engine is one of the worker.  "
        "[default: process]",
    ),
    click.option(
        "--zero-copy/--no-zero-copy",
        default=None,
        help="Have the file's I/O run on the clients' own pages; for the backend file with --isolation none, on Linux "
        "6.16 and newer.  [default: no-zero-copy]",
    ),
)


def device_options(command: _Command) -> _Command:
    """Decorator: all options that describe a device, in this order in the help."""
    return reduce(lambda decorated, option: option(decorated), reversed(_OPTIONS), command)
