"""Tests that several pytest processes share are each run once, and a failure or a death of one process is told."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
_NOTES_ITSELF = """
import os
def test_one(): os.close(os.open({mark!r}, os.O_CREAT | os.O_EXCL))
"""


def run(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "support.spread",
            "-c",
            os.devnull,
            "--rootdir",
            str(directory),
            *arguments,
            str(directory),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
        capture_output=True,
        text=True,
        timeout=120,
    )


def write(directory: Path, name: str, text: str) -> None:
    (directory / f"test_{name}.py").write_text(text)


def test_each_file_is_run_once(tmp_path: Path) -> None:
    for number in range(12):
        write(tmp_path, f"{number}", _NOTES_ITSELF.format(mark=str(tmp_path / f"mark-{number}")))
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout
    assert len(list(tmp_path.glob("mark-*"))) == 12
    assert done.stderr.count("[12/12]") == 1 and done.stderr.count(" s  test_") == 12


def test_a_failure_is_told_and_ends_every_process_where_that_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path, "0", "def test_one(): raise ValueError('it went wrong')")
    for number in range(1, 40):
        write(tmp_path, f"{number}", "import time\ndef test_one(): time.sleep(0.1)")
    done = run(tmp_path, "-x")
    assert done.returncode == 1 and "ValueError: it went wrong" in done.stdout
    assert done.stderr.count(" s  test_") < 39


def test_the_death_of_a_process_fails_the_run(tmp_path: Path) -> None:
    write(tmp_path, "0", "import os, signal\ndef test_one(): os.kill(os.getpid(), signal.SIGKILL)")
    write(tmp_path, "1", "def test_one(): pass")
    done = run(tmp_path)
    assert done.returncode == -9 & 0xFF and "pytest died by signal 9 (SIGKILL)" in done.stdout
