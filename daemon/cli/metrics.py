"""The command that serves metrics: `metrics`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ublkpool.daemon.cli.options import check_library, listen_address, run_dir_option

if TYPE_CHECKING:
    from ublkpool.daemon.settings.config import LogFormat, LogLevel


@click.command(short_help="Serve metrics for Prometheus.")
@click.option(
    "--listen",
    default="unix",
    metavar="ADDRESS",
    help="ADDRESS:PORT such as 127.0.0.1:9847, unix for metrics.sock in the run directory, or unix:PATH.  "
    "[default: unix]",
)
@click.option(
    "--log-format",
    type=click.Choice(["auto", "human", "logfmt", "json"]),
    default="auto",
    metavar="auto|human|logfmt|json",
    help="Format of the log on stderr; auto is human on a terminal or in the journal, else logfmt.  [default: auto]",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    metavar="debug|info|warning|error",
    help="Log this level and above.  [default: info]",
)
@run_dir_option()
def metrics(listen: str, log_format: "LogFormat", log_level: "LogLevel", run_dir: Path) -> int:
    """Serve the daemon's metrics over HTTP, at /metrics, until SIGTERM.

    The daemon runs this itself if its config has [metrics], or with `serve --metrics`.  A process of its own asks the
    daemon at each scrape; while no daemon answers, ublkpool_up is 0.  It needs the extra packages of ublkpool[metrics].

    \b
    ublkpool metrics --listen 127.0.0.1:9847
    curl -s http://127.0.0.1:9847/metrics
    """
    check_library()
    address = listen_address(listen, run_dir)
    from ublkpool.daemon import logs
    from ublkpool.daemon.metrics.exporter import run

    logs.configure(log_level, log_format)
    return run(run_dir, address)
