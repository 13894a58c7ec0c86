"""The report's files: RESULTS.md and the charts, from the JSON files of one output directory."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from bench.charts import draw_cpu, draw_speed
from bench.density_results import Density, density_report
from bench.doorbell import Doorbells, doorbell_report
from bench.exact import exact_report
from bench.growth_results import Growth, growth_report
from bench.instructions import InstructionCost
from bench.nbd_results import nbd_report
from bench.rbd_results import rbd_report
from bench.results import read_result
from bench.tables import report

_PREFACE = (
    "# What was measured\n\n"
    "Written by `make bench`, see README.md here for the method. Ratios within one table mean something; "
    "absolute numbers of an emulated guest do not, but for the instructions of an exact one.\n"
)


def publish(out: Path, into: Path, instructions: Sequence[InstructionCost], note: str = "") -> str:
    """Write the results in `out` as a report into `into`; returns its text."""
    into.mkdir(parents=True, exist_ok=True)
    sections = [_PREFACE, f"**{note}**\n"] if note else [_PREFACE]
    for path in sorted(out.glob("speed-[0-9]*.json"), reverse=True):
        result = read_result(path)
        charts = {f"{path.stem}.png": draw_speed, f"{path.stem.replace('speed', 'cpu')}.png": draw_cpu}
        for name, draw in charts.items():
            draw(result, into / name)
        links = "\n".join(f"![{name}]({name})\n" for name in charts)
        sections.append(report(result, instructions) + "\n" + links)
    for path in sorted(out.glob("growth-[0-9]*.json"), reverse=True):
        sections.append(growth_report(_growth(path)))
    for path in sorted(out.glob("speed-exact-*.json"), reverse=True):
        sections.append(exact_report(read_result(path)))
    for path in sorted(out.glob("growth-exact-*.json"), reverse=True):
        sections.append(growth_report(_growth(path)))
    for path in sorted(out.glob("density-*.json"), reverse=True):
        sections.append(density_report(msgspec.json.decode(path.read_bytes(), type=Density)))
    for path in sorted(out.glob("nbd-*.json"), reverse=True):
        sections.append(nbd_report(read_result(path)))
    for path in sorted(out.glob("rbd-*.json"), reverse=True):
        sections.append(rbd_report(read_result(path)))
    for path in sorted(out.glob("doorbell-*.json"), reverse=True):
        sections.append(doorbell_report(msgspec.json.decode(path.read_bytes(), type=Doorbells)))
    text = "\n".join(sections)
    (into / "RESULTS.md").write_text(text)
    return text


def _growth(path: Path) -> Growth:
    return msgspec.json.decode(path.read_bytes(), type=Growth)
