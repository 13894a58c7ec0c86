"""The command of the live screen: `top`."""

from pathlib import Path

import click

from ublkpool.daemon.cli.options import run_dir_option
from ublkpool.daemon.cli.watch_option import check_seconds


@click.command(short_help="Show devices, queues and events on a live screen.")
@click.option(
    "--interval",
    "interval_s",
    metavar="SECONDS",
    default="1",
    callback=check_seconds,
    help="Read the daemon's numbers so often (0.1 to 86400).  [default: 1]",
)
@click.option(
    "--sort",
    "sort_by",
    metavar="COLUMN",
    default="NAME",
    help="Sort by the column of this name, such as P99 or R/S.  [default: NAME]",
)
@click.option(
    "--ascii",
    "is_ascii",
    is_flag=True,
    help="Draw with ASCII characters only; names, reasons and events keep theirs.",
)
@run_dir_option()
def top(interval_s: float, sort_by: str, is_ascii: bool, run_dir: Path) -> int:
    """Show the devices, their queues and the last events on a live screen.

    Requests and bytes a second, P50 and P99 of the interval, requests in flight, buffers, recoveries; Enter shows one
    device in depth, `?` the keys and what the numbers mean, q ends.  80x24 is enough; a larger screen shows more.  A
    daemon that ends is waited for.  stdin, stdout and stderr must be a terminal, and the Python package textual be
    installed, which ublkpool[top] brings.

    \b
    ublkpool top
    ublkpool top --interval 5 --sort P99

    For scripts, and without a terminal: ublkpool stats --watch.
    """
    _check_library()
    from ublkpool.daemon.cli.top import terminal
    from ublkpool.daemon.cli.top.device_columns import DEVICE_COLUMNS

    by_name = {each.name.casefold(): each.name for each in DEVICE_COLUMNS}
    if sort_by.casefold() not in by_name:
        raise click.UsageError(
            f"--sort {sort_by!r}: there is no such column; there are {', '.join(by_name.values())}"
        )
    terminal.check_terminal()
    from ublkpool.daemon.cli.top.screen import run

    return run(run_dir, interval_s, by_name[sort_by.casefold()], is_ascii)


def _check_library() -> None:
    """Raise `click.UsageError` if this environment lacks what draws the screen."""
    from importlib.util import find_spec

    if find_spec("textual") is None:
        raise click.UsageError(
            "top needs the Python package textual: pip install 'ublkpool[top]', or with the Debian package what "
            '"The Debian package" in docs/OPERATIONS.md says; without it use: ublkpool stats --watch'
        )
