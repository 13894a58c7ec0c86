"""The commands of `ublkpool`, which imports each only when it is asked for."""

import click

from ublkpool.daemon.cli.commands import cli


def cli_commands() -> dict[str, click.Command]:
    """All commands by name, in the order of the help."""
    context = click.Context(cli)
    found = {name: cli.get_command(context, name) for name in cli.list_commands(context)}
    return {name: command for name, command in found.items() if command is not None}
