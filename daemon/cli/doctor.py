"""The command that examines the machine: `doctor`."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ublkpool.daemon.cli.options import check_directory, json_option, print_json, run_dir_option

if TYPE_CHECKING:
    from ublkpool.daemon.doctor.finding import Finding, Report

_FAILED = 1


@click.command(short_help="Examine this machine for ublkpool.")
@json_option
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path),
    envvar="UBLKPOOL_STATE_DIR",
    callback=check_directory,
    help="The daemon's state directory; also read from UBLKPOOL_STATE_DIR.  "
    "[default: /var/lib/ublkpool; below that for another run directory]",
)
@run_dir_option()
def doctor(as_json: bool, state_dir: Path | None, run_dir: Path) -> int:
    """Examine this machine: what keeps ublkpool from serving, or will, each with the way out.

    Looks at the kernel and its known defects, the ublk driver and its features, limits, udev's rules, the daemon, its
    directories and what dead daemons left.  It changes nothing, and needs neither root nor the driver nor a daemon;
    what it may not look at it says.  A check that hangs ends after 10 s.

    \b
    sudo ublkpool doctor
    ublkpool doctor --json | jq -r '.findings[] | select(.level == "fail").says'

    Exit status: 0 all is well or there are only warnings, 1 there is a failure, 2 wrong usage.
    """
    import asyncio

    from ublkpool.daemon.doctor.examination import examine
    from ublkpool.daemon.doctor.probes import running_probes, running_system

    report = asyncio.run(examine(running_system(run_dir, state_dir), running_probes()))
    if as_json:
        print_json(report)
    else:
        click.echo(as_text(report))
    return _FAILED if report.level == "fail" else 0


def as_text(report: "Report") -> str:
    """The findings for people, and their counts."""
    return "\n".join([*(line for each in report.findings for line in _lines(each)), _sum(report)])


def _lines(finding: "Finding") -> list[str]:
    lines = [f"{finding.level:<4}  {finding.check}: {finding.says}"]
    if finding.way_out:
        lines.append(f"      way out: {finding.way_out}")
    if finding.sources:
        lines.append(f"      see: {' '.join(finding.sources)}")
    return lines


def _sum(report: "Report") -> str:
    counts = Counter(each.level for each in report.findings)
    return f"ok: {counts['ok']}, warnings: {counts['warn']}, failures: {counts['fail']}"
