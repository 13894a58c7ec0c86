"""The command line, a contract: `ublkpool serve | add | del | rebind | list | stats | backend | shutdown | ...`.

Owns options, exit statuses (0, 1 failed, 2 usage or config) and the one line on stderr.  Must not know how
anything is done, and imports it only in the command that needs it: a client command has to start fast.
"""

import os
import sys
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from ublkpool import __version__

if TYPE_CHECKING:
    from ublkpool.bufpool.sdk.client import Transport
    from ublkpool.daemon.admin.client import AdminClient
    from ublkpool.daemon.settings.config import DeviceConfig, LogFormat, OnStop, Problem, ServeConfig
    from ublkpool.daemon.status import DeviceStatus

RUN_DIR_DEFAULT = Path("/run/ublkpool")
INTERRUPTED = 130


class _Commands(click.Group):
    """Commands whose every failure is one line and an exit status."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        kwargs["standalone_mode"] = False
        try:
            status = super().main(*args, **kwargs)
        except click.Abort:
            sys.exit(INTERRUPTED)
        except click.ClickException as error:
            _complain([_usage_line(error)])
            sys.exit(error.exit_code)
        except Exception as error:
            sys.exit(_failed(error))
        sys.exit(status or 0)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


class _AddCommand(click.Command):
    """`--wait` takes a number or nothing: what follows it is its value only if it is a number."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        pairs = zip_longest(args, args[1:], fillvalue="")
        return super().parse_args(ctx, [_whole_wait(arg, following) for arg, following in pairs])


def _whole_wait(arg: str, following: str) -> str:
    is_bare = arg == "--wait" and not following.replace(".", "", 1).isdecimal()
    return "--wait=inf" if is_bare else arg


def _usage_line(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    hint = f" (see {context.command_path} --help)" if context is not None else ""
    return " ".join(error.format_message().split()) + hint


def _failed(error: Exception) -> int:
    from ublkpool.daemon.errors import lines_of, status_of

    if os.environ.get("UBLKPOOL_DEBUG") == "1":
        import traceback

        _say_error("".join(traceback.format_exception(error)).rstrip("\n"))
    _complain(lines_of(error))
    return status_of(error)


def _complain(lines: Sequence[str]) -> None:
    for line in lines:
        _say_error(f"ublkpool: {line}")


def _say_error(text: str) -> None:
    from ublkpool.daemon import journal

    click.echo(
        journal.with_priority(text, journal.ERROR) if journal.is_journal(sys.stderr) else text, err=True
    )


def _directory(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Where a daemon runs.  The current directory, which '' names as well, is never meant."""
    if value == Path():
        raise click.BadParameter("names the current directory: name one of its own, such as /run/ublkpool")
    if value is None:
        return None
    # Here rather than at the top: a command that is only asked for help has no directory.
    from ublkpool.bufpool.way_out import too_long_for_sockets

    if reason := too_long_for_sockets(value.absolute()):
        raise click.BadParameter(reason, ctx=ctx, param=param)
    return value.absolute()


_Command = Callable[..., Any]


def _run_dir_option(default: Path | None = RUN_DIR_DEFAULT) -> Callable[[_Command], _Command]:
    shown = "the config's, or " + str(RUN_DIR_DEFAULT) if default is None else str(default)
    return click.option(
        "--run-dir",
        type=click.Path(path_type=Path),
        envvar="UBLKPOOL_RUN_DIR",
        default=default,
        callback=_directory,
        help=f"Where the daemon keeps its sockets; also in UBLKPOOL_RUN_DIR.  [default: {shown}]",
    )


_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


@click.group(cls=_Commands, no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ublkpool", message="%(prog)s %(version)s")
def cli() -> None:
    """Serve Linux block devices from user space, through ublk.

    \b
    One terminal:      ublkpool serve
    Another:           ublkpool add vol0 --size 1G --backend memory
                       mkfs.ext4 /dev/ublkb0 && mount /dev/ublkb0 /mnt
    In the end:        umount /mnt && ublkpool del vol0

    Exit status: 0 done, 1 failed, 2 wrong usage or config.  UBLKPOOL_DEBUG=1 adds a traceback to errors.
    """


@cli.command()
@click.option(
    "-c",
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    help="TOML file; without, no devices yet.",
)
@click.option(
    "--on-stop",
    type=click.Choice(["delete", "leave"]),
    metavar="delete|leave",
    help="SIGTERM deletes every device, or leaves them, served, for the next daemon.  "
    "[default: the config's, or delete]",
)
@click.option(
    "--replace",
    is_flag=True,
    help="Take over from a daemon that runs in this run directory: its devices go on, with this version's code.",
)
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path),
    envvar="UBLKPOOL_STATE_DIR",
    callback=_directory,
    help="Where the daemon remembers, across reboots, from what each device is served; also in UBLKPOOL_STATE_DIR.  "
    "[default: the config's, or /var/lib/ublkpool; below that for another run directory]",
)
@_run_dir_option(default=None)
def serve(
    config_file: Path | None,
    on_stop: "OnStop | None",
    replace: bool,
    state_dir: Path | None,
    run_dir: Path | None,
) -> int:
    """Run the daemon in the foreground, until SIGTERM.

    It serves the devices of the config file, and those that `ublkpool add` asks for; it logs to stderr.  What an
    earlier daemon in the run directory left, killed or not, it goes on with.

    \b
    ublkpool serve
    ublkpool serve -c /etc/ublkpool/ublkpool.toml
    ublkpool serve -c test.toml --run-dir /run/ublkpool-test
    ublkpool serve --replace          # an upgrade: I/O pauses, nothing fails
    """
    config = _serve_config(config_file, run_dir)._replace(replace=replace)
    if on_stop is not None:
        config = config._replace(on_stop=on_stop)
    if state_dir is not None:
        config = config._replace(state_dir=state_dir)
    from ublkpool.daemon import logs
    from ublkpool.daemon.supervisor import serve as serve_devices

    logs.configure(config.log_level, config.log_format)
    return serve_devices(config)


def _serve_config(config_file: Path | None, run_dir: Path | None) -> "ServeConfig":
    from ublkpool.daemon.settings.config import ServeConfig
    from ublkpool.daemon.settings.config_file import load_config

    if config_file is not None:
        return load_config(config_file, run_dir)
    return ServeConfig(run_dir=run_dir or RUN_DIR_DEFAULT)


@cli.command(cls=_AddCommand)
@click.argument("name")
@click.argument("options", nargs=-1, metavar="[KEY=VALUE ...]")
@click.option("--size", metavar="N", help="Bytes, or with K, M, G, T; without, the backend's size.")
@click.option("--queues", type=int, metavar="N", help="Hardware queues, a worker process each.  [default: 1]")
@click.option(
    "--depth", type=int, metavar="N", help="Requests in flight per queue, up to 4096.  [default: 128]"
)
@click.option(
    "--id", "id_", type=int, metavar="N", help="The N of /dev/ublkbN; without, the kernel's choice."
)
@click.option("--max-io", metavar="N", help="Largest request, 4K to 32M.  [default: 512K]")
@click.option(
    "--need-get-data/--no-need-get-data",
    default=None,
    help="Ask for a buffer when a write arrives, or lend one to every tag beforehand.  [default: ask]",
)
@click.option(
    "--placement",
    metavar="pool|backend",
    help="Who names the memory a write lands in; backend needs --need-get-data.  [default: pool]",
)
@click.option(
    "--answers",
    metavar="backend|worker",
    help="Who answers requests: a backend, or the workers themselves, which store nothing and read zeros.  "
    "[default: backend]",
)
@click.option(
    "--recovery",
    metavar="reissue|abort|fail|none",
    help="After a worker's death: send its requests again, fail those it held, fail all until it is back, "
    "or give the device up.  [default: reissue]",
)
@click.option("--read-only", is_flag=True, default=None, help="Refuse writes.")
@click.option(
    "--partitions/--no-partitions",
    default=None,
    help="Look for a partition table at the start, or only when asked (blockdev --rereadpt).  [default: look]",
)
@click.option(
    "--rings/--no-rings",
    default=None,
    help="Offer backends rings in shared memory, or frames only.  [default: offer]",
)
@click.option(
    "--spin",
    type=int,
    metavar="US",
    help="Microseconds to look for work in rings before sleeping, 0 to 1000.  [default: 20 from 16 CPUs on, else 0]",
)
@click.option("--pool", metavar="N", help="Bytes of the buffer pool; without, derived from queues and depth.")
@click.option(
    "--huge-pages",
    metavar="auto|off|require",
    help="The pool in huge pages: as far as they can be had, not, or only so.  [default: auto]",
)
@click.option(
    "--affinity",
    metavar="auto|off|CPUS",
    help="Where workers run: on a CPU of their queue, anywhere, or on these, as in 0-3,8.  [default: auto]",
)
@click.option(
    "--client-buffers",
    metavar="N",
    help="Bytes of memory that clients may use as I/O buffers, so that nothing is copied; see `client`.  [default: 0]",
)
@click.option(
    "--io-timeout", type=float, metavar="SECONDS", help="How long a backend may take.  [default: 30]"
)
@click.option(
    "--on-timeout",
    metavar="wait|fail",
    help="What then: keep waiting, or fail with ETIMEDOUT.  [default: wait]",
)
@click.option(
    "--on-absent",
    metavar="wait|fail",
    help="Without a backend: requests wait for the next, or fail after --absent-timeout.  [default: wait]",
)
@click.option(
    "--absent-timeout",
    type=float,
    metavar="SECONDS",
    help="How long they wait for one, with --on-absent fail.  [default: 60]",
)
@click.option(
    "--backend", metavar="KIND|FILE.py", help="Run this backend, with KEY=VALUE options, as a child."
)
@click.option(
    "--wait",
    "wait_s",
    type=float,
    metavar="[SECONDS]",
    help="Without --backend: return only when a backend has attached and the device is live.",
)
@_run_dir_option()
def add(
    name: str, options: tuple[str, ...], id_: int | None, wait_s: float | None, run_dir: Path, **rest: Any
) -> None:
    """Create the device NAME and print its path, /dev/ublkbN, once it can be used.

    With --backend the daemon runs that backend itself and gives it the KEY=VALUE options; FILE.py and
    relative paths among the values are meant from your current directory.  Without, the device waits for a
    backend to attach: add returns at once and prints no path, unless --wait is given.

    \b
    ublkpool add scratch --size 1G --backend memory
    ublkpool add vol0 --queues 4 --backend file path=/var/lib/vol0.img size=10G
    ublkpool add mine --size 64M --placement backend --backend ./mybackend.py colour=blue
    ublkpool add vol1 --size 10G --wait 30
    ublkpool add floor --size 1G --answers worker
    """
    device = _device_config({"name": name, "id": id_, **rest}, options)
    client = _client(run_dir)
    status = client.add(device)
    if status.state == "waiting" and wait_s is not None:
        status = client.wait_live(name, None if wait_s == float("inf") else wait_s)
    _show_added(status)


def _device_config(given: dict[str, Any], options: Sequence[str]) -> "DeviceConfig":
    """The device that these options describe.  Raises `ConfigError` in terms of the command line."""
    from ublkpool.daemon.errors import ConfigError
    from ublkpool.daemon.settings.config import check_device

    table = {key: value for key, value in given.items() if value is not None}
    pairs = _pairs(options)
    if "backend" in table:
        table["backend"] = {**pairs, "kind": table["backend"]}
    elif pairs:
        raise click.UsageError(f"{options[0]} is an option for a backend; name one with --backend")
    problems: list[Problem] = []
    device = check_device(table, (), problems, Path.cwd())
    if device is None:
        raise ConfigError([f"{_option_name(str(path[0]))}: {message}" for path, message in problems])
    return device


def _option_name(key: str) -> str:
    return "NAME" if key == "name" else "--" + key.replace("_", "-")


def _pairs(options: Sequence[str]) -> dict[str, str]:
    """KEY=VALUE arguments as a dictionary."""
    pairs: dict[str, str] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not key or not equals:
            raise click.UsageError(f"expected KEY=VALUE, got {option!r}")
        if key in pairs or key == "kind":
            raise click.UsageError(
                f"{key}= is given twice" if key in pairs else "kind= is no option: it is the KIND"
            )
        pairs[key] = value
    return pairs


def _show_added(status: "DeviceStatus") -> None:
    from ublkpool.daemon.errors import DaemonError

    if status.state == "live":
        click.echo(status.path)
    elif status.state == "waiting":
        attach = f"ublkpool backend KIND|FILE.py --device {status.name} [KEY=VALUE ...]"
        click.echo(f"ublkpool: {status.name} waits for a backend; attach one with: {attach}", err=True)
    else:
        raise DaemonError(
            f"{status.name} is {status.state}: {status.reason or 'the log of the daemon says why'}"
        )


def _client(run_dir: Path) -> "AdminClient":
    from ublkpool.daemon.admin.client import AdminClient

    def say(text: str) -> None:
        click.echo(text, err=True)

    def complain(text: str) -> None:
        _complain([text])

    return AdminClient(run_dir, say if sys.stderr.isatty() else lambda text: None, complain)


@cli.command(name="del")
@click.argument("names", nargs=-1, metavar="NAME...")
@click.option("--all", "delete_all", is_flag=True, help="Every device of this daemon.")
@click.option("--force", is_flag=True, help="Even if it is in use: what is in flight fails.")
@_run_dir_option()
def delete(names: tuple[str, ...], delete_all: bool, force: bool, run_dir: Path) -> None:
    """Delete devices, and print their names.

    One that is in use stays, and the error names who uses it; of several, all stay then.

    \b
    ublkpool del vol0 vol1
    ublkpool del --all
    """
    if delete_all == bool(names):
        raise click.UsageError("name the devices to delete, or say --all" + (", not both" if names else ""))
    for name in _client(run_dir).delete(None if delete_all else list(names), force):
        click.echo(name)


@cli.command()
@click.argument("name")
@_run_dir_option()
def rebind(name: str, run_dir: Path) -> None:
    """Accept another store for the device NAME: the next one that attaches becomes its own.

    A device is served from the file or disk that served it first; any other is refused, and requests wait.  Say this
    after you replaced that store on purpose.  It holds for one attach.  No empty file is made in the place of a
    missing one; a memory disk whose keeper is gone begins empty.

    \b
    ublkpool rebind vol0
    """
    _client(run_dir).rebind(name)


@cli.command(name="list")
@_json_option
@_run_dir_option()
def list_devices(as_json: bool, run_dir: Path) -> None:
    """Show the devices.

    \b
    ublkpool list
    ublkpool list --json | jq -r '.[] | select(.state == "live").path'
    """
    devices = _client(run_dir).devices()
    if as_json:
        _print_json(devices)
        return
    from ublkpool.daemon.cli.render import device_table, print_table

    print_table(device_table(devices))


@cli.command()
@click.argument("name", required=False)
@_json_option
@_run_dir_option()
def stats(name: str | None, as_json: bool, run_dir: Path) -> None:
    """Show what each queue of each device, or of the device NAME, has done.

    Requests and bytes by operation, errors, what is in flight, buffers, and bytes copied.

    \b
    ublkpool stats
    ublkpool stats vol0 --json | jq '.[0].queues[].requests.write'
    """
    devices = _client(run_dir).stats(name)
    if as_json:
        _print_json(devices)
        return
    from ublkpool.daemon.cli.render import print_table, stats_tables

    for table in stats_tables(devices):
        print_table(table)


@cli.command()
@click.argument("kind", metavar="KIND|FILE.py")
@click.argument("options", nargs=-1, metavar="[KEY=VALUE ...]")
@click.option("--device", required=True, metavar="NAME", help="The device to attach to.")
@click.option(
    "--transport",
    type=click.Choice(["auto", "ring", "zeromq"]),
    default="auto",
    metavar="auto|ring|zeromq",
    help="How requests travel: rings in shared memory if there are any, or frames.  [default: auto]",
)
@click.option(
    "--log-format",
    type=click.Choice(["auto", "human", "logfmt", "json"]),
    default="auto",
    metavar="auto|human|logfmt|json",
    help="What it writes to stderr.  [default: auto]",
)
@_run_dir_option()
def backend(
    kind: str,
    options: tuple[str, ...],
    device: str,
    transport: "Transport",
    log_format: "LogFormat",
    run_dir: Path,
) -> int:
    """Be the backend of a device, in this process, until the device is deleted or SIGTERM.

    KIND is a built-in backend, such as null, memory or file; FILE.py is one of your own.

    \b
    ublkpool backend file --device vol0 path=/var/lib/vol0.img
    ublkpool backend ./mybackend.py --device vol1 colour=blue
    """
    pairs = _pairs(options)
    from ublkpool.bufpool.sdk.loader import run_backend
    from ublkpool.daemon import logs

    logs.configure("info", log_format)
    return run_backend(kind, pairs, device, run_dir, transport=transport)


@cli.command()
@click.option("--final", is_flag=True, help="All is stopped and unmounted: end the devices, and the daemon.")
@_run_dir_option()
def shutdown(final: bool, run_dir: Path) -> None:
    """Tell the daemon that the machine goes down; for the units ublkpool-shutdown and ublkpool-shutdown-final.

    From then on a device without a backend fails its requests after 3 s, so that no umount waits for ever.  With
    --final what is still mounted on our disks is unmounted, every device is deleted, in use or not, and the daemon
    ends.

    \b
    ublkpool shutdown
    ublkpool shutdown --final
    """
    from ublkpool.daemon import logs
    from ublkpool.daemon.cli.shutdown import begin, finish

    logs.configure("info", "auto")
    (finish if final else begin)(run_dir)


@cli.command(context_settings={"ignore_unknown_options": True})
@click.argument("name")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="COMMAND...")
@_run_dir_option()
def client(name: str, command: tuple[str, ...], run_dir: Path) -> None:
    """Run COMMAND with an I/O buffer that the backend of the disk NAME shares: what goes through it is not copied.

    The disk's path is in UBLKPOOL_DISK, the buffer's, a file to be mapped shared, in UBLKPOOL_BUFFER, its size in
    UBLKPOOL_BUFFER_BYTES.  Direct I/O only.  Without such memory (--client-buffers, SHMEM_ZC in `ublkpool features`) it
    is a file like any other, and what goes through it is copied.

    \b
    ublkpool client vol0 -- sh -c 'fio --name=a --filename=$UBLKPOOL_DISK --direct=1 --rw=write --bs=512k \\
        --ioengine=io_uring --iodepth=8 --size=1G --iomem=mmapshared:$UBLKPOOL_BUFFER'
    """
    from ublkpool.bufpool.sdk.client_buffers import ClientBuffer

    buffer = ClientBuffer.open(name, run_dir=run_dir)
    buffer.leave_open()
    os.environ["UBLKPOOL_DISK"] = buffer.path
    os.environ["UBLKPOOL_BUFFER"] = f"/proc/self/fd/{buffer.descriptor}"
    os.environ["UBLKPOOL_BUFFER_BYTES"] = str(buffer.size_bytes)
    os.execvp(command[0], command)


@cli.command()
@_json_option
@_run_dir_option()
def features(as_json: bool, run_dir: Path) -> None:
    """Show what the ublk driver of this kernel offers; asks the driver, not the daemon.

    \b
    ublkpool features
    ublkpool features --json | jq .flags
    """
    from ublkpool.ublk.abi import feature_names
    from ublkpool.ublk.control import get_features

    bits = get_features()
    names = list(feature_names(bits))
    if as_json:
        _print_json({"bits": bits, "flags": names})
        return
    for name in names:
        click.echo(name)


def _print_json(value: object) -> None:
    import msgspec

    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2))


def main() -> NoReturn:
    """The console script."""
    cli.main(prog_name="ublkpool")
