"""The command that changes a device while it serves: `set`."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ublkpool.daemon.cli.options import admin_client, json_option, print_json, run_dir_option

if TYPE_CHECKING:
    from ublkpool.daemon.settings.changes import Scalar


@click.command(name="set", short_help="Change settings of a device, or show them.")
@click.argument("name")
@click.argument("pairs", nargs=-1, metavar="[KEY=VALUE ...]")
@json_option
@run_dir_option()
def set_device(name: str, pairs: tuple[str, ...], as_json: bool, run_dir: Path) -> None:
    """Change settings of the device NAME while it serves; without KEY=VALUE show its settings.

    io_timeout, on_timeout, absent_timeout and on_absent, as in the config file, hold in every worker when the command
    returns, also for requests that wait; iops_max, bytes_per_s_max and burst hold 0.1 s later.  backend.KEY is an
    option of the backend that the daemon runs, which gets it at its next start.  If one value is wrong, none changes.

    What was set holds for as long as the device exists, also over restarts of the daemon.  A device that is made anew
    has what the config file says.

    \b
    ublkpool set vol0
    ublkpool set vol0 io_timeout=5 on_timeout=fail
    ublkpool set vol0 iops_max=500 bytes_per_s_max=100M
    ublkpool set vol0 backend.cache=1G
    """
    settings = admin_client(run_dir).set(name, _values(pairs))
    if as_json:
        print_json(settings)
    elif not pairs:
        from ublkpool.daemon.cli.render import print_table, settings_table

        print_table(settings_table(settings))
    elif any(pair.startswith("backend.") for pair in pairs):
        click.echo(f"ublkpool: the backend of {name} gets its new options at its next start", err=True)


def _values(pairs: Sequence[str]) -> "dict[str, Scalar]":
    values: dict[str, Scalar] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not key or not equals:
            raise click.UsageError(f"expected KEY=VALUE, got {pair!r}")
        if key in values:
            raise click.UsageError(f"{key}= is given twice")
        values[key] = text if key.startswith("backend.") else _scalar(text)
    return values


def _scalar(text: str) -> "Scalar":
    """The value as a config file has it: a number or a bool, else the text itself."""
    if text in ("true", "false"):
        return text == "true"
    try:
        number = float(text)
    except ValueError:
        return text
    if not math.isfinite(number):
        return text
    return int(text) if text.isdecimal() else number
