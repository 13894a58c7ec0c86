"""The command that creates a device: `add`."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ublkpool.bufpool.way_out import explain
from ublkpool.daemon.cli.device_options import device_options
from ublkpool.daemon.cli.options import admin_client, layer_option, parse_pairs, run_dir_option

if TYPE_CHECKING:
    from ublkpool.daemon.settings.config import DeviceConfig, Problem
    from ublkpool.daemon.status import DeviceStatus


class _AddCommand(click.Command):
    """Gives `--wait` an optional number: the next argument is its value only if that is a number."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        pairs = zip_longest(args, args[1:], fillvalue="")
        return super().parse_args(ctx, [_with_wait_value(arg, following) for arg, following in pairs])


def _with_wait_value(arg: str, following: str) -> str:
    is_bare = arg == "--wait" and not following.replace(".", "", 1).isdecimal()
    return "--wait=inf" if is_bare else arg


@click.command(cls=_AddCommand, short_help="Create a device and print its path.")
@click.argument("name")
@click.argument("options", nargs=-1, metavar="[KEY=VALUE ...]")
@device_options
@layer_option
@click.option(
    "--wait",
    "wait_s",
    type=float,
    metavar="[SECONDS]",
    help="Without --backend: return only when a backend has attached and the device is live.",
)
@click.option(
    "--take-over",
    is_flag=True,
    help="Break the lock that another client has on the store, such as a host that is cut off.  That client can write "
    "no more.",
)
@run_dir_option()
def add(
    name: str,
    options: tuple[str, ...],
    layers: tuple[str, ...],
    wait_s: float | None,
    take_over: bool,
    run_dir: Path,
    **described: object,
) -> None:
    """Create the device NAME and print its path, /dev/ublkbN, once it can be used.

    With --backend the daemon runs that backend itself and gives it the KEY=VALUE options; FILE.py and relative paths
    among the values start at your current directory.  Without --backend the device waits for a backend to attach: add
    returns at once and prints no path, unless --wait is given.

    \b
    ublkpool add scratch --size 1G --backend memory
    ublkpool add vol0 --queues 4 --backend file path=/var/lib/vol0.img size=10G
    ublkpool add mine --size 64M --placement backend --backend ./mybackend.py colour=blue
    ublkpool add vol1 --size 10G --wait 30
    ublkpool add floor --size 1G --answers worker
    """
    device = _device_config({"name": name, **described}, options, layers)
    client = admin_client(run_dir)
    status = client.add(device, take_over)
    if status.state == "waiting" and wait_s is not None:
        status = client.wait_live(name, None if wait_s == float("inf") else wait_s)
    _show_added(status)


def _current_directory() -> Path:
    """The directory in which relative paths begin.  Raises `ConfigError` if it has been removed."""
    from ublkpool.daemon.errors import ConfigError

    try:
        return Path.cwd()
    except OSError as error:
        raise ConfigError(
            [
                f"your current directory: {explain(error)}: change to one that exists, for relative paths begin there"
            ]
        ) from error


def _device_config(
    described: Mapping[str, object], options: Sequence[str], layers: Sequence[str]
) -> "DeviceConfig":
    """The device that these options describe.  Raises `ConfigError` in terms of the command line."""
    from ublkpool.daemon.errors import ConfigError

    table = {key: value for key, value in described.items() if value is not None}
    pairs = parse_pairs(options)
    from ublkpool.daemon.settings.config import WITHOUT_LISTS, check_device

    repeated = next((key for key, value in pairs.items() if not isinstance(value, str)), None)
    if repeated is not None and table.get("backend") in WITHOUT_LISTS:
        raise click.UsageError(f"{repeated}= is given twice")
    if "backend" in table:
        table["backend"] = {**pairs, "kind": table["backend"], "layers": layers}
    elif layers:
        raise click.UsageError(f"--layer {layers[0]} is for a backend; name one with --backend")
    elif pairs:
        raise click.UsageError(f"{options[0]} is an option for a backend; name one with --backend")
    problems: list[Problem] = []
    device = check_device(table, (), problems, _current_directory())
    if device is None:
        raise ConfigError([f"{_option_name(str(path[0]))}: {message}" for path, message in problems])
    return device


def _option_name(key: str) -> str:
    return "NAME" if key == "name" else "--" + key.replace("_", "-")


def _show_added(status: "DeviceStatus") -> None:
    from ublkpool.daemon.errors import DaemonError

    if status.state == "live":
        click.echo(status.path)
    elif status.state == "waiting":
        attach = f"ublkpool backend KIND|FILE.py --device {status.name} [KEY=VALUE ...]"
        click.echo(f"ublkpool: {status.name} waits for a backend; attach one with: {attach}", err=True)
    else:
        raise DaemonError(f"{status.name} is {status.state}: {status.reason or 'see the log of the daemon'}")
