"""The command that has the daemon read its config file again: `reload`."""

from pathlib import Path

import click

from ublkpool.daemon.cli.options import admin_client, run_dir_option


@click.command(short_help="Have the daemon read its config file again.")
@run_dir_option()
def reload(run_dir: Path) -> int:
    """Have the daemon read its config file again, and print what becomes of each device.

    The file is checked as a whole first; with a mistake in it nothing changes, and the status is 2.  Then new devices
    are added, and a device gets every changed setting that can change while it serves, see `ublkpool set`.  The output
    names what needs more: a new device, a restart, or `ublkpool del` for a device that is no longer in the file.  The
    status is 1 then.  SIGHUP does the same, and the log has the result.

    \b
    ublkpool reload              # systemctl reload ublkpool does this
    """
    results = admin_client(run_dir).reload()
    for each in results:
        for text in filter(None, (each.done, each.needs)):
            click.echo(f"{each.name}: {text}")
    return int(any(each.needs for each in results))
