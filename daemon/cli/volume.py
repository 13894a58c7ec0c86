"""The commands `volume create|list|...|info`: the stores of devices, without a daemon."""

import sys
from typing import TYPE_CHECKING

import click

from ublkpool.bufpool.sizes import format_size, parse_size
from ublkpool.daemon.cli.options import parse_pairs, print_json

if TYPE_CHECKING:
    from ublkpool.bufpool.sdk.volumes import Volume, Volumes


class _Size(click.ParamType[int]):
    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_size(str(value))
        except ValueError as error:
            self.fail(str(error))


_size = click.option("--size", "size_bytes", type=_Size(), required=True, metavar="SIZE", help="Such as 10G.")
_kind = click.argument("kind")
_options = click.argument("options", nargs=-1, metavar="KEY=VALUE ...")


@click.group(short_help="Make, list and delete volumes.")
def volume() -> None:
    """Make, list, grow, snapshot, clone and delete the volumes that devices are served from.

    KIND and KEY=VALUE lead to a volume as in `ublkpool backend`: for file path=, for cow overlay= and base=, for rbd
    pool=, namespace=, image=, snapshot=, conf= and id=.  No daemon is needed.  A volume in use is refused, by a device
    or another program.

    \b
    ublkpool volume create file path=/var/lib/vol0.img --size 10G
    ublkpool volume clone file path=/var/lib/golden.img --to /var/lib/vm7.img
    ublkpool volume clone rbd pool=vms image=golden --to vm7
    ublkpool volume list rbd pool=vms

    \b
              create  list  resize  snapshot  clone  delete
    file      yes     yes   grow    no        yes    yes
    cow       yes     yes   grow    no        no     yes
    rbd       yes     yes   grow    yes       yes    yes

    An overlay of cow can also be reset and committed into a new base, and info tells how much of its disk it holds.

    Exit status: 0 done, 1 failed, 2 wrong usage, or a volume that is missing, in use or there already.
    """


@volume.command(short_help="Make a volume.")
@_kind
@_options
@_size
def create(kind: str, options: tuple[str, ...], size_bytes: int) -> None:
    """Make a volume, which must not exist yet, and print what leads to it.

    It takes no room before it is written (a sparse file, an image without objects).

    \b
    ublkpool volume create file path=/var/lib/vol0.img --size 10G
    ublkpool add vol0 --backend file path=/var/lib/vol0.img
    """
    click.echo(_volumes(kind, options).create(size_bytes))


@volume.command("list", short_help="List volumes.")
@_kind
@_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def list_volumes(kind: str, options: tuple[str, ...], as_json: bool) -> None:
    """List volumes with their sizes and who uses them, as far as their store shows it.

    For file path= is a directory, for rbd pool= and namespace= say where.

    \b
    ublkpool volume list file path=/var/lib/images
    ublkpool volume list rbd pool=vms --json
    """
    found = _volumes(kind, options).list()
    if as_json:
        print_json(found)
        return
    from ublkpool.daemon.cli.render import Table, print_table

    headers = ("volume", "size", "used", "parent", "snapshots", "used by")
    print_table(Table(headers, [_row(each) for each in found]))


def _row(found: "Volume") -> tuple[str, ...]:
    used = "-" if found.used_bytes is None else format_size(found.used_bytes)
    lists = (" ".join(found.snapshots), "; ".join(found.users))
    return found.name, format_size(found.size_bytes), used, *(each or "-" for each in (found.parent, *lists))


@volume.command(short_help="Grow a volume that no device uses.")
@_kind
@_options
@_size
def resize(kind: str, options: tuple[str, ...], size_bytes: int) -> None:
    """Make a volume larger while no device uses it; `ublkpool resize` grows one that is served.

    \b
    ublkpool volume resize file path=/var/lib/vol0.img --size 20G
    """
    before_bytes = _volumes(kind, options).resize(size_bytes)
    if before_bytes == size_bytes:
        click.echo(f"has {format_size(size_bytes)} already, nothing changes")
    else:
        click.echo(f"grew from {format_size(before_bytes)} to {format_size(size_bytes)} ({size_bytes} bytes)")


@volume.command(short_help="Keep a volume's content of now.")
@_kind
@_options
@click.option("--name", required=True, help="The snapshot's name.")
def snapshot(kind: str, options: tuple[str, ...], name: str) -> None:
    """Keep a volume's content of now as a snapshot, and print what leads to it.

    A device in use goes on; what its file system has not written yet is not in the snapshot: `ublkpool drain` and
    fsfreeze(8) before it make it consistent.

    \b
    ublkpool volume snapshot rbd pool=vms image=golden --name monday
    ublkpool add old --backend rbd pool=vms image=golden snapshot=monday
    """
    click.echo(_volumes(kind, options).snapshot(name))


@volume.command(short_help="Make a volume with another one's content.")
@_kind
@_options
@click.option("--to", "target", required=True, metavar="PATH|IMAGE", help="The new volume.")
def clone(kind: str, options: tuple[str, ...], target: str) -> None:
    """Make a new volume with the content of this one, and print what leads to it.

    A file is cloned at once where its file system shares blocks (btrfs, XFS), else copied, and must not be written
    meanwhile.  An image is cloned at once, from snapshot= or from its content of now, and shares with it what neither
    has written.

    \b
    ublkpool volume clone rbd pool=vms image=golden --to vm7
    ublkpool add vm7 --backend rbd pool=vms image=vm7
    """
    progress = _Progress()
    try:
        made = _volumes(kind, options).clone(target, progress.show)
    finally:
        progress.end()
    click.echo(made)


@volume.command(short_help="Delete a volume.")
@_kind
@_options
def delete(kind: str, options: tuple[str, ...]) -> None:
    """Delete a volume, or with snapshot= a snapshot, that nothing uses.  Its content is lost.

    \b
    ublkpool volume delete file path=/var/lib/vol0.img
    ublkpool volume delete rbd pool=vms image=golden snapshot=monday
    """
    _volumes(kind, options).delete()


@volume.command(short_help="Throw an overlay's content away.")
@_kind
@_options
def reset(kind: str, options: tuple[str, ...]) -> None:
    """Throw away what was written to an overlay that no device uses: its disk reads as its base again.

    With base= the overlay gets another base, such as the one that commit made.

    \b
    ublkpool volume reset cow overlay=/var/lib/vm7.cow
    ublkpool volume reset cow overlay=/var/lib/vm7.cow base=/var/lib/golden2.img
    """
    click.echo(_volumes(kind, options).reset())


@volume.command(short_help="Write an overlay and its base into a new base.")
@_kind
@_options
@click.option("--to", "target", required=True, metavar="PATH", help="The new base.")
def commit(kind: str, options: tuple[str, ...], target: str) -> None:
    """Write the disk of an overlay that no device uses into a new file, and print what leads to it.

    Overlay and base stay as they are.  An interrupted commit leaves no file of that name.

    \b
    ublkpool volume commit cow overlay=/var/lib/vm7.cow --to /var/lib/golden2.img
    ublkpool volume create cow overlay=/var/lib/vm8.cow base=/var/lib/golden2.img --size 10G
    """
    progress = _Progress()
    try:
        made = _volumes(kind, options).commit(target, progress.show)
    finally:
        progress.end()
    click.echo(made)


@volume.command(short_help="Tell how much of its disk an overlay holds.")
@_kind
@_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of lines.")
def info(kind: str, options: tuple[str, ...], as_json: bool) -> None:
    """Tell how much of its disk an overlay holds, and what keeps it from being served; also while it is served.

    \b
    ublkpool volume info cow overlay=/var/lib/vm7.cow
    """
    found = _volumes(kind, options).info()
    if as_json:
        print_json(found)
        return
    of = 100 * found.own_bytes // max(found.size_bytes, 1)
    click.echo(f"disk:     {format_size(found.size_bytes)} ({found.size_bytes} bytes)")
    click.echo(f"base:     {found.parent}")
    click.echo(f"overlay:  {format_size(found.own_bytes)} of the disk ({of} %), {_zeros(found.zero_bytes)}")
    click.echo(f"takes:    {format_size(found.used_bytes or 0)}")
    click.echo(f"used by:  {'; '.join(found.users) or '-'}")
    if found.trouble:
        click.echo(f"trouble:  {found.trouble}")


def _zeros(zero_bytes: int) -> str:
    return f"and {format_size(zero_bytes)} of zeros that take no room"


def _volumes(kind: str, options: tuple[str, ...]) -> "Volumes":
    pairs = parse_pairs(options)
    from ublkpool.bufpool.sdk.loader import load_volumes

    return load_volumes(kind, pairs)


class _Progress:
    """A line on stderr, if that is a terminal."""

    def __init__(self) -> None:
        self._shown = ""

    def show(self, done: int, of: int) -> None:
        text = f"{100 * done // max(of, 1)} %"
        if sys.stderr.isatty() and text != self._shown:
            self._shown = text
            click.echo(f"\r{text}", err=True, nl=False)

    def end(self) -> None:
        if self._shown:
            click.echo("\r     \r", err=True, nl=False)
