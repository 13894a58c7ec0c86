"""The command `resize`."""

from pathlib import Path
from typing import NamedTuple

import click

from ublkpool.bufpool.sizes import format_size, parse_size
from ublkpool.daemon.cli.options import admin_client, run_dir_option


class Asked(NamedTuple):
    """A new size in bytes, or how many bytes more."""

    size_bytes: int
    is_relative: bool


class _Size(click.ParamType[Asked]):
    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Asked:
        text = str(value).strip()
        if text.startswith("-"):
            self.fail(f"{text!r}: a device never shrinks: write its new size, or +SIZE for that much more")
        try:
            return Asked(parse_size(text.removeprefix("+")), text.startswith("+"))
        except ValueError as error:
            self.fail(str(error))


@click.command(
    short_help="Grow a live device.",
    # A negative SIZE is no option, and gets a line of its own.
    context_settings={"ignore_unknown_options": True},
)
@click.argument("name")
@click.argument("asked", metavar="SIZE", type=_Size())
@run_dir_option()
def resize(name: str, asked: Asked, run_dir: Path) -> None:
    """Give the live device NAME the size SIZE, such as 10G, or with +SIZE that much more, and print the change.

    The store grows first (the backend does that, if it can), then the disk; clients go on meanwhile.  Grow the file
    system on it afterwards.  The new size is kept and wins over a smaller `size` of the config.  A device never
    shrinks.  Needs Linux 6.16 (see `ublkpool features`).

    \b
    ublkpool resize vol0 20G && resize2fs /dev/ublkb0
    ublkpool resize vol0 +5G
    """
    result = admin_client(run_dir).resize(name, asked.size_bytes, asked.is_relative)
    after = f"{format_size(result.after_bytes)} ({result.after_bytes} bytes)"
    if result.before_bytes == result.after_bytes:
        click.echo(f"{name}: has {after} already, nothing changes")
    else:
        click.echo(f"{name}: grew from {format_size(result.before_bytes)} to {after}")
