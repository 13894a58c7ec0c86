"""Charts of a result: a bar for each contestant, its range over the rounds as a whisker.

The only module that needs matplotlib, which `make bench` installs (extra `bench`).
"""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from bench.cells import CELLS, Cell
from bench.ratios import middle_of, samples_of, value_spread
from bench.results import Party, Result

_COLOURS = {"ublkpool": "#1f77b4", "kublk": "#ff7f0e", "nbdkit": "#2ca02c", "kernel": "#7f7f7f"}
_ROW_INCHES = 0.26


def draw_speed(result: Result, path: Path) -> None:
    """Every cell side by side, on a logarithmic scale."""
    height = 1.2 + _ROW_INCHES * len(result.parties)
    figure = Figure(figsize=(5 * len(CELLS), height))
    found = figure.subplots(1, len(CELLS), sharey=True)
    for axes, cell in zip(found, CELLS, strict=True):
        _draw_cell(axes, result, cell)
    figure.suptitle(f"Linux {result.kernel}, {result.date}, {result.rounds_done} rounds: median and range")
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def _draw_cell(axes: Axes, result: Result, cell: Cell) -> None:
    rows = list(enumerate(reversed(result.parties)))
    for row, party in rows:
        value = value_spread(result, party.name, cell.name)
        if value:
            whisker = [[value.median - value.low], [value.high - value.median]]
            axes.barh(row, value.median, xerr=whisker, color=_COLOURS[party.family], height=0.7)
    axes.set_yticks([row for row, _ in rows], [party.name for _, party in rows])
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title(f"{cell.name}, {cell.unit}")
    axes.grid(axis="x", alpha=0.3)


def draw_cpu(result: Result, path: Path) -> None:
    """CPU time of the whole machine for each request, split by part."""
    height = 1.2 + _ROW_INCHES * len(result.parties)
    figure = Figure(figsize=(5 * len(CELLS), height))
    found = figure.subplots(1, len(CELLS), sharey=True)
    for axes, cell in zip(found, CELLS, strict=True):
        _draw_cpu_cell(axes, result.parties, result, cell)
    found[0].legend(loc="best", fontsize="small")
    figure.suptitle(f"Linux {result.kernel}, {result.date}: CPU time for each request, us")
    figure.tight_layout()
    figure.savefig(path, dpi=90)


_PARTS = {
    "fio": "#bbbbbb",
    "server": "#ff7f0e",
    "worker": "#1f77b4",
    "backend": "#17becf",
    "kernel": "#7f7f7f",
}


def _draw_cpu_cell(axes: Axes, parties: Sequence[Party], result: Result, cell: Cell) -> None:
    rows = list(enumerate(reversed(parties)))
    left = [0.0] * len(rows)
    for part, colour in _PARTS.items():
        widths = [
            middle_of(
                [sum(each.parts_us.get(part, (0, 0))) for each in samples_of(result, party.name, cell.name)]
            )
            for _, party in rows
        ]
        axes.barh([row for row, _ in rows], widths, left=left, color=colour, height=0.7, label=part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_yticks([row for row, _ in rows], [party.name for _, party in rows])
    axes.set_title(cell.name)
    axes.grid(axis="x", alpha=0.3)
