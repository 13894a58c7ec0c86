"""Refusals of `python -m bench`, and the paths of its results."""

from pathlib import Path

import pytest
from bench import __main__ as command
from click.testing import CliRunner


def test_mode_exact_is_refused_where_time_is_not_instructions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UBLKPOOL_EXACT", raising=False)
    done = CliRunner().invoke(command.main, ["measure", "--mode", "exact", str(tmp_path)])
    assert done.exit_code == 1
    assert "needs a guest in which time is instructions: `make bench MODE=exact`" in done.output
    assert list(tmp_path.iterdir()) == []


def test_an_exact_result_does_not_overwrite_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.release", lambda: "7.3.4+deb13-cloud-amd64")
    names = []
    for exact in ("", "1"):
        monkeypatch.setenv("UBLKPOOL_EXACT", exact)
        names += [command.result_path(Path("out"), what).name for what in ("speed", "growth", "nbd", "rbd")]
    plain = ["speed-7.3.json", "growth-7.3.json", "nbd-7.3.json", "rbd-7.3.json"]
    assert names == [*plain, *(each.replace("-", "-exact-") for each in plain)]
