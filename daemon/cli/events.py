"""`ublkpool events`: what has happened to the devices, from the daemon or, without one, from its state directory."""

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ublkpool.daemon.cli.complaints import complain
from ublkpool.daemon.cli.options import check_directory, run_dir_option
from ublkpool.daemon.cli.reader import check_reader, ends_with_reader, print_text

if TYPE_CHECKING:
    from ublkpool.daemon.events.event import Event

FILE_BYTES_MAX = 64 << 20
"""As much as a config can have a daemon keep."""
_AGO = re.compile(r"(\d{1,9})([smhd])\Z")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


@click.command(short_help="Show what has happened to the devices.")
@click.argument("names", nargs=-1, metavar="[NAME...]")
@click.option("--follow", "-f", is_flag=True, help="Go on with the events to come, also of the next daemon.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object for each event, one on a line.")
@click.option(
    "--since", metavar="TIME", help="Not older: 30s, 10m, 2h, 7d, or a UTC time as 2026-11-26T15:44."
)
@click.option(
    "--after", metavar="SEQ", type=click.IntRange(min=0), default=0, help="Only later numbers (`seq`)."
)
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path),
    envvar="UBLKPOOL_STATE_DIR",
    callback=check_directory,
    help="Where a daemon that does not run has left its events.  [default: as for `serve`]",
)
@run_dir_option()
def events(
    names: tuple[str, ...],
    follow: bool,
    as_json: bool,
    since: str | None,
    after: int,
    state_dir: Path | None,
    run_dir: Path,
) -> None:
    """Show what has happened: devices, backends, workers, recoveries, takeovers.  All devices, or those named.

    Each event has a number that rises, a code that no version renames, and details; docs/EVENTS.md explains each code.
    If no daemon runs, the events are read from its state directory.

    \b
    ublkpool events vol0 --since 2h
    ublkpool events --follow
    ublkpool events --json | jq -r 'select(.code == "recovery-ended").details.seconds'
    """
    from ublkpool.daemon.events.event import render, render_json

    show = render_json if as_json else render
    shown = _Shown(
        after,
        list(names) or None,
        _time(since) if since else "",
        lambda event: print_text(f"{show(event)}\n"),
    )
    with ends_with_reader():
        shown.run(run_dir, state_dir, follow)


class _Shown:
    """The events that were shown, so that none is shown twice."""

    def __init__(
        self, after: int, names: list[str] | None, since: str, show: "Callable[[Event], None]"
    ) -> None:
        self._last = after
        self._names = names
        self._since = since
        self._show = show

    def run(self, run_dir: Path, state_dir: Path | None, follow: bool) -> None:
        """Raises `DaemonError` if the daemon refuses, or unless it follows if there is neither a daemon nor a file."""
        from ublkpool.daemon.errors import DaemonError, DaemonUnreachable

        try:
            self._ask(run_dir, follow)
        except DaemonUnreachable as unreachable:
            try:
                self._read_file(run_dir, state_dir, unreachable)
            except DaemonError as error:
                if not follow:
                    raise
                complain([str(error)])
            if follow:
                self._ask(run_dir, follow, waits=True)

    def _ask(self, run_dir: Path, follow: bool, waits: bool = False) -> None:
        from ublkpool.client import Client

        def warn(text: str) -> None:
            complain([text])

        client = Client(run_dir, warn, warn, check_reader)
        for event in client.events(self._last, self._names, self._since, follow=follow, waits=waits):
            self._take(event)

    def _take(self, event: "Event") -> None:
        if event.seq > self._last:
            self._last = event.seq
            self._show(event)

    def _read_file(self, run_dir: Path, state_dir: Path | None, unreachable: Exception) -> None:
        from ublkpool.bufpool.way_out import explain
        from ublkpool.daemon.device.state import candidates
        from ublkpool.daemon.errors import DaemonError
        from ublkpool.daemon.events.event_file import has_events, load

        places = candidates(run_dir, state_dir)
        try:
            found = [each for each in places if has_events(each)]
            kept = load(found[0], FILE_BYTES_MAX) if found else []
        except OSError as error:
            raise DaemonError(f"{unreachable}; and {error.filename}: {explain(error)}") from error
        if not found:
            where = " or ".join(map(str, places))
            raise DaemonError(
                f"{unreachable}; and no events in {where}: name the daemon's directory with --state-dir"
            )
        complain([f"{unreachable}; these events are those in {found[0]}"])
        for event in kept:
            if (self._names is None or event.device in self._names) and event.time >= self._since:
                self._take(event)


def _time(text: str) -> str:
    """The time that the user means, as an event has it.  Raises `click.UsageError`."""
    from ublkpool.daemon.events.event import shown_time

    try:
        if match := _AGO.match(text):
            moment = datetime.now(UTC) - timedelta(**{_UNITS[match[2]]: int(match[1])})
        else:
            moment = datetime.fromisoformat(text)
            moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
        return shown_time(moment.timestamp())
    except (ValueError, OverflowError):
        raise click.UsageError(
            f"--since {text!r}: expected 30s, 10m, 2h, 7d, or a time such as 2026-11-26T15:44"
        ) from None
