"""The command that asks the kernel's driver and not the daemon: `features`."""

import click

from ublkpool.daemon.cli.options import json_option, print_json, run_dir_option


@click.command(short_help="Show the features of the ublk driver.")
@json_option
@run_dir_option()
def features(as_json: bool, run_dir: object) -> None:
    """Show the features of this kernel's ublk driver; asks the driver, not the daemon.

    \b
    ublkpool features
    ublkpool features --json | jq .flags
    """
    from ublkpool.ublk.abi import feature_names
    from ublkpool.ublk.control import get_features

    bits = get_features()
    names = list(feature_names(bits))
    if as_json:
        print_json({"bits": bits, "flags": names})
        return
    for name in names:
        click.echo(name)
