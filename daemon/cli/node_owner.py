"""The command that udev runs for a node of the driver: `node-owner`."""

import re

import click

from ublkpool.daemon.cli.options import run_dir_option

_NODE = re.compile(r"(?:/dev/)?ublk[bc](\d+)(?:p\d+)?\Z")


@click.command(name="node-owner", short_help="For udev: which ordinary user a node is to belong to.")
@click.argument("node")
@run_dir_option()
def node_owner(node: str, run_dir: object) -> int:
    """Print the numbers of the user and the group that added the device of NODE, such as ublkc0 or ublkb0p1.

    For config/99-ublkpool.users.rules, which runs it as root.  Prints nothing and fails for a device of root's: its
    nodes are root's already.  Asks the driver, not the daemon.

    \b
    ublkpool node-owner ublkc0
    """
    from ublkpool.ublk.abi import Feature
    from ublkpool.ublk.control import device_info_by_path

    match = _NODE.match(node)
    if match is None:
        raise click.UsageError(f"expected a node of the ublk driver, such as ublkc0, got {node!r}")
    info = device_info_by_path(int(match[1]))
    if not info.flags & Feature.UNPRIVILEGED_DEV:
        return 1
    click.echo(f"{info.owner_uid} {info.owner_gid}")
    return 0
