"""The commands for the maintenance of a backend: `drain`, `resume`."""

from pathlib import Path

import click

from ublkpool.daemon.cli.options import admin_client, run_dir_option


@click.command(short_help="Have a device's requests wait and its backend leave.")
@click.argument("name")
@click.option("--no-flush", is_flag=True, help="Do not ask the backend to write out what it caches.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Give up after that time; the device goes on then.  [default: wait]",
)
@run_dir_option()
def drain(name: str, no_flush: bool, timeout_s: float | None, run_dir: Path) -> None:
    """Have the requests of the device NAME wait, and its backend leave; print "drained" then.

    New requests wait, without any time limit.  What the backend has is finished, then it confirms a FLUSH and ends.
    Its store is whole then: copy it, move it, exchange the backend.  No backend may attach until `ublkpool resume
    NAME`.  Ctrl-C before that has the device go on.

    \b
    ublkpool drain vol0 && cp /var/lib/vol0.img /backup/; ublkpool resume vol0
    """
    admin_client(run_dir).drain(name, not no_flush, timeout_s)
    click.echo("drained")


@click.command(short_help="Have a drained device's requests served again.")
@click.argument("name")
@run_dir_option()
def resume(name: str, run_dir: Path) -> None:
    """Have the requests of the drained device NAME go to its next backend.

    A backend that the daemon runs is started; start another yourself.

    \b
    ublkpool resume vol0
    """
    admin_client(run_dir).resume(name)
