"""The commands that start and end the daemon: `serve`, `shutdown`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ublkpool.daemon.cli.options import check_directory, check_library, listen_address, run_dir_option

if TYPE_CHECKING:
    from ublkpool.daemon.settings.config import OnStop, ServeConfig


@click.command()
@click.option(
    "-c",
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    help="TOML file with the daemon's settings and devices.  [default: none; the daemon starts without devices]",
)
@click.option(
    "--on-stop",
    type=click.Choice(["delete", "leave"]),
    metavar="delete|leave",
    help="On SIGTERM delete every device, or leave the devices, still served, for the next daemon.  "
    "[default: the config's, or delete]",
)
@click.option(
    "--replace",
    is_flag=True,
    help="Take the devices over from the daemon that runs in this run directory; they go on with this version's code.",
)
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path),
    envvar="UBLKPOOL_STATE_DIR",
    callback=check_directory,
    help="Where the daemon records, across reboots, which store each device has; also read from UBLKPOOL_STATE_DIR.  "
    "[default: the config's, or /var/lib/ublkpool; below that for another run directory]",
)
@click.option(
    "--metrics",
    "listen",
    metavar="ADDRESS",
    help="Serve metrics for Prometheus there: ADDRESS:PORT such as 127.0.0.1:9847, unix for a socket in the run "
    "directory, or unix:PATH.  [default: the config's, or none]",
)
@click.option(
    "--prepare",
    type=click.IntRange(0, 1024),
    metavar="N",
    help="Keep N devices prepared, with workers and without a store, so that an add of a device of their shape takes "
    "milliseconds: isolation none and a device's defaults, or what the config's [prepare] says.  "
    "[default: the config's, or 0]",
)
@run_dir_option(default=None)
def serve(
    config_file: Path | None,
    on_stop: "OnStop | None",
    replace: bool,
    state_dir: Path | None,
    listen: str | None,
    prepare: int | None,
    run_dir: Path | None,
) -> int:
    """Run the daemon in the foreground, until SIGTERM.

    The daemon serves the devices of the config file and those that `ublkpool add` creates; it logs to stderr.  If an
    earlier daemon left devices in the run directory, also by being killed, this daemon takes them over.

    \b
    ublkpool serve
    ublkpool serve -c /etc/ublkpool/ublkpool.toml
    ublkpool serve -c test.toml --run-dir /run/ublkpool-test
    ublkpool serve --prepare 8        # eight devices wait for `add --isolation none`
    ublkpool serve --replace          # an upgrade: I/O pauses, nothing fails
    """
    config = _serve_config(config_file, run_dir)._replace(replace=replace)
    if on_stop is not None:
        config = config._replace(on_stop=on_stop)
    if state_dir is not None:
        config = config._replace(state_dir=state_dir)
    if listen is not None:
        config = config._replace(metrics=listen_address(listen, config.run_dir))
    if prepare is not None:
        config = _preparing(config, prepare)
    if config.metrics is not None:
        check_library()
    from ublkpool.daemon import logs
    from ublkpool.daemon.lifetime import serve as serve_devices

    logs.configure(config.log_level, config.log_format)
    return serve_devices(config)


def _preparing(config: "ServeConfig", count: int) -> "ServeConfig":
    import msgspec

    from ublkpool.daemon.settings.config import Prepare

    table = msgspec.structs.replace(config.prepare_table, count=count)
    return config._replace(prepare=Prepare.of(table) if count else None)


def _serve_config(config_file: Path | None, run_dir: Path | None) -> "ServeConfig":
    from ublkpool.daemon.settings.config import ServeConfig
    from ublkpool.daemon.settings.config_file import load_config

    if config_file is not None:
        return load_config(config_file, run_dir)
    from ublkpool.daemon.settings.user_directories import usual_run_dir

    return ServeConfig(run_dir=run_dir or usual_run_dir(serves=True))


@click.command(short_help="Tell the daemon that the machine goes down.")
@click.option(
    "--final", is_flag=True, help="Unmount what is still mounted, delete all devices, end the daemon."
)
@run_dir_option()
def shutdown(final: bool, run_dir: Path) -> None:
    """Tell the daemon that the machine goes down; for the units ublkpool-shutdown and ublkpool-shutdown-final.

    From then on a device without a backend fails its requests after 3 s, so that no umount waits for ever.  With
    --final the command unmounts what is still mounted on the daemon's disks; then the daemon deletes every device, in
    use or not, and ends.

    \b
    ublkpool shutdown
    ublkpool shutdown --final
    """
    from ublkpool.daemon import logs
    from ublkpool.daemon.cli.shutdown import begin, finish

    logs.configure("info", "auto")
    (finish if final else begin)(run_dir)
