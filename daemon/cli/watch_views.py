"""How `stats --watch` shows an interval: a line of JSON a device, a table, or a table in place on a terminal."""

import os
import sys
from typing import Protocol, TextIO

import msgspec

from ublkpool.bufpool.sizes import format_size
from ublkpool.daemon.cli.complaints import complain
from ublkpool.daemon.cli.reader import check_reader, print_text
from ublkpool.daemon.cli.render import Table, format_duration, format_rate, plain_text, terminal_size
from ublkpool.daemon.rates import DeviceRates, Interval, Measured

_CLEAR = "\x1b[H\x1b[J"
"""Cursor to the first column of the first line; erase all below (ECMA-48: CUP, ED)."""


class View(Protocol):
    """What an interval is shown on."""

    def show(self, interval: Interval) -> None:
        """Show the interval; a first reading has no rates."""

    def say(self, text: str) -> None:
        """Show a line about the daemon."""


def make_view(as_json: bool) -> View:
    """The view for stdout as it is."""
    if as_json:
        return JsonLines()
    is_screen = sys.stdout is not None and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    return Screen(sys.stdout) if is_screen else Blocks()


class JsonLines:
    """A line for each device whose interval is whole; the daemon's absence is told on stderr."""

    def show(self, interval: Interval) -> None:
        """Each line is flushed, so that a reader has it at once."""
        for each in interval.devices:
            if each.rates is not None:
                print_text(msgspec.json.encode(each.rates).decode() + "\n")

    def say(self, text: str) -> None:
        """The line goes to stderr, which is no JSON."""
        _tell(text)


class Blocks:
    """A table for each interval, with an empty line after it."""

    def show(self, interval: Interval) -> None:
        """A first reading is not shown."""
        if interval.elapsed_s is not None:
            print_text(f"{heading(interval)}\n{plain_text(rates_table(interval))}\n")

    def say(self, text: str) -> None:
        """The line goes to stderr."""
        _tell(text)


class Screen:
    """The table of the last interval, in place on a terminal; never more lines than the terminal has."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._lines: list[str] = []

    def show(self, interval: Interval) -> None:
        """Replace what is shown."""
        columns, _ = terminal_size(self._out)
        self._lines = [heading(interval), *plain_text(rates_table(interval), columns).splitlines()]
        self._draw(self._lines)

    def say(self, text: str) -> None:
        """Show the line above the last interval, which stays for the reader."""
        self._draw([text, *self._lines])

    def _draw(self, lines: list[str]) -> None:
        columns, rows = terminal_size(self._out)
        print_text(_CLEAR + "".join(f"{line}\n" for line in fitting(lines, columns, rows - 1)))


def _tell(text: str) -> None:
    """Print the line on stderr; raises `ReaderGone` if the reader of stdout is gone, too."""
    try:
        complain([text])
    except BrokenPipeError:
        check_reader()


def heading(interval: Interval) -> str:
    """The interval's end and length."""
    length = "counting" if interval.elapsed_s is None else f"{interval.elapsed_s:.1f} s"
    return f"{interval.time}  {length}"


def fitting(lines: list[str], columns: int, rows: int) -> list[str]:
    """The lines that fit in these rows, where a long line takes several; the last one says how many are missing."""
    if sum(_rows(line, columns) for line in lines) <= rows:
        return lines
    kept: list[str] = []
    left = rows - 1
    for line in lines:
        left -= _rows(line, columns)
        if left < 0:
            break
        kept.append(line)
    return [*kept, f"{len(lines) - len(kept)} more lines; name a device to see it alone"[:columns]]


def _rows(line: str, columns: int) -> int:
    return max(1, -(-len(line) // columns))


def rates_table(interval: Interval) -> Table:
    """A row for each device; without rates where no interval is whole, without a latency where none was counted."""
    headers = (
        *("NAME", "R/S", "W/S", "R B/S", "W B/S", "R P50", "R P99", "W P50", "W P99"),
        *("ACTIVE", "OTHER/S", "ERRORS/S", "REASON"),
    )
    return Table(headers, [_row(each) for each in interval.devices])


def _row(measured: Measured) -> tuple[str, ...]:
    stats, rates = measured.stats, measured.rates
    values, rare = (("",) * 8, ("", "")) if rates is None else (_values(rates), _rare_values(rates))
    return (stats.name, *values, str(sum(queue.in_flight for queue in stats.queues)), *rare, stats.reason)


def _values(rates: DeviceRates) -> tuple[str, ...]:
    requests, size, latency = rates.requests_per_s, rates.bytes_per_s, rates.latency
    durations = (latency.read.p50_s, latency.read.p99_s, latency.write.p50_s, latency.write.p99_s)
    return (
        format_rate(requests.read),
        format_rate(requests.write),
        format_size(round(size.read)),
        format_size(round(size.write)),
        *map(format_duration, durations),
    )


def _rare_values(rates: DeviceRates) -> tuple[str, ...]:
    """Empty for 0, so that most devices have one line of 80 columns."""
    requests = rates.requests_per_s
    rare = (requests.flush + requests.discard + requests.write_zeroes, rates.errors_per_s)
    return tuple(format_rate(each) if each else "" for each in rare)
