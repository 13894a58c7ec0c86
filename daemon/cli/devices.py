"""The commands about devices that exist: `del`, `rebind`, `list`, `stats`."""

from pathlib import Path

import click

from ublkpool.daemon.cli.options import admin_client, json_option, print_json, run_dir_option
from ublkpool.daemon.cli.watch_option import WatchCommand, check_seconds


@click.command(name="del")
@click.argument("names", nargs=-1, metavar="NAME...")
@click.option("--all", "delete_all", is_flag=True, help="Delete every device of this daemon.")
@click.option("--force", is_flag=True, help="Delete devices in use, too; their requests in flight fail.")
@click.option(
    "--keep-stores", is_flag=True, help="Do not forget which store each name has, as at the daemon's end."
)
@run_dir_option()
def delete(names: tuple[str, ...], delete_all: bool, force: bool, keep_stores: bool, run_dir: Path) -> None:
    """Delete devices, and print their names.

    A device in use is not deleted, and the error names its users (mounts, holders, swap, processes).  If one of several
    devices is in use, none is deleted.

    \b
    ublkpool del vol0 vol1
    ublkpool del --all
    """
    if delete_all == bool(names):
        raise click.UsageError("name the devices to delete, or say --all" + (", not both" if names else ""))
    client = admin_client(run_dir)
    for name in client.delete(None if delete_all else list(names), force, keeps_stores=keep_stores):
        click.echo(name)


@click.command(short_help="Accept a replaced store for a device.")
@click.argument("name")
@run_dir_option()
def rebind(name: str, run_dir: Path) -> None:
    """Let the device NAME accept another store: the store of the next backend to attach becomes the device's.

    A device is served only from the file or disk that served it first; the daemon refuses any other, and requests wait.
    Run this after you replaced that store on purpose; it holds for one attach.  A missing file is not replaced by an
    empty one; a memory disk whose keeper process is gone begins empty.

    \b
    ublkpool rebind vol0
    """
    admin_client(run_dir).rebind(name)


@click.command(name="list")
@json_option
@run_dir_option()
def list_devices(as_json: bool, run_dir: Path) -> None:
    """Show the devices.

    \b
    ublkpool list
    ublkpool list --json | jq -r '.[] | select(.state == "live").path'
    """
    devices = admin_client(run_dir).devices()
    if as_json:
        print_json(devices)
        return
    from ublkpool.daemon.cli.render import device_table, print_table

    print_table(device_table(devices))


@click.command(cls=WatchCommand, short_help="Show the counters of queues and pools, or rates as they change.")
@click.argument("name", required=False)
@click.option(
    "--watch",
    "interval_s",
    metavar="[SECONDS]",
    callback=check_seconds,
    help="Show the rates of each interval of so many seconds (0.1 to 86400; 1 if left out), until Ctrl-C.",
)
@json_option
@run_dir_option()
def stats(name: str | None, interval_s: float | None, as_json: bool, run_dir: Path) -> None:
    """Show the counters of each queue of each device, or of the device NAME.

    Requests and bytes by operation, errors, requests in flight, buffers, bytes copied, and what 50 % and 99 % of the
    reads and of the writes did not exceed (P50, P99), since the queue was made.

    With --watch: a row for each device at each interval's end, with requests and bytes a second and the interval's own
    P50 and P99; on a terminal in place.  With --json: a line for each device and interval, with `time` (UTC),
    `interval_s` (its real length), `requests_per_s`, `bytes_per_s`, `errors_per_s`, `latency`, and the counters so far.
    A device that is new, or that was made anew, has rates from the second reading on.  A daemon that ends is waited
    for, with a line on stderr; rates then begin anew.

    \b
    ublkpool stats
    ublkpool stats vol0 --json | jq '.[0].queues[].requests.write'
    ublkpool stats vol0 --watch
    ublkpool stats --watch 10 --json | jq '[.name, .requests_per_s.read, .latency.read.p99_s]'

    docs/OPERATIONS.md explains the numbers.
    """
    if interval_s is not None:
        from ublkpool.daemon.cli.watch import watch

        watch(name, interval_s, as_json, run_dir)
        return
    devices = admin_client(run_dir).stats(name)
    if as_json:
        print_json(devices)
        return
    from ublkpool.daemon.cli.render import print_table, stats_tables

    for table in stats_tables(devices):
        print_table(table)
