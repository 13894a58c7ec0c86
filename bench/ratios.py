"""Medians, ranges and ratios of samples.  Pure.

A ratio is made within a round, of two runs that are neighbours in time; its median and range are over the rounds.
"""

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from bench.cells import EVERY_CELL, Cell
from bench.results import Result, Sample


class Spread(NamedTuple):
    """A median with its range."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread | None:
    """None if there is nothing."""
    return Spread(median(values), min(values), max(values)) if values else None


def cell_named(name: str) -> Cell:
    """Raises `StopIteration` if there is none."""
    return next(each for each in EVERY_CELL if each.name == name)


def shown(sample: Sample) -> float:
    """The number of a sample that its cell shows."""
    return sample.iops if cell_named(sample.cell).unit == "IOPS" else sample.bytes_per_s / 1e6


def samples_of(result: Result, contestant: str, cell: str) -> list[Sample]:
    """A contestant's samples in a cell, those without an error."""
    return [
        each
        for each in result.samples
        if each.contestant == contestant and each.cell == cell and not each.error
    ]


def value_spread(result: Result, contestant: str, cell: str) -> Spread | None:
    """The cell's own number over the rounds."""
    return spread([shown(each) for each in samples_of(result, contestant, cell)])


def ratio_spread(result: Result, contestant: str, baseline: str, cell: str) -> Spread | None:
    """The ratio to the baseline over the rounds; None if no round has both."""
    base = {each.round: shown(each) for each in samples_of(result, baseline, cell)}
    return spread(
        [
            shown(each) / base[each.round]
            for each in samples_of(result, contestant, cell)
            if base.get(each.round)
        ]
    )


def middle_of(values: Sequence[float]) -> float:
    """Their median, so that one disturbed round does not show; 0 for no values."""
    return median(values) if values else 0.0
