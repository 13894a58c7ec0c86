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
_WAITS_FOR_A_FAILURE = """
import os, time
from pathlib import Path
from support.claims import DIRECTORY, Claims
def test_one():
    while not Claims(Path(os.environ[DIRECTORY])).is_closed: time.sleep(0.01)
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
        timeout=200,
    )


def write(directory: Path, name: str, text: str) -> None:
    (directory / f"test_{name}.py").write_text(text)


def test_each_file_is_run_once(tmp_path: Path) -> None:
    for number in range(12):
        write(tmp_path, f"{number}", _NOTES_ITSELF.format(mark=str(tmp_path / f"mark-{number}")))
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout
    assert len(list(tmp_path.glob("mark-*"))) == 12
    assert all(f"[{number}/12]" in done.stderr for number in range(1, 13))
    assert done.stderr.count(" s  test_") == 12


def test_a_failure_is_told_and_ends_every_process_where_that_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path, "0", "def test_one(): raise ValueError('it went wrong')")
    for number in range(1, 40):
        write(tmp_path, f"{number}", _WAITS_FOR_A_FAILURE)
    done = run(tmp_path, "-x")
    assert done.returncode == 1 and "ValueError: it went wrong" in done.stdout
    assert done.stderr.count(" s  test_") < len(os.sched_getaffinity(0)), (
        "each other process does one at most"
    )


def test_the_death_of_a_process_fails_the_run(tmp_path: Path) -> None:
    write(tmp_path, "0", "import os, signal\ndef test_one(): os.kill(os.getpid(), signal.SIGKILL)")
    write(tmp_path, "1", "def test_one(): pass")
    done = run(tmp_path)
    assert done.returncode == -9 & 0xFF and "pytest died by signal 9 (SIGKILL)" in done.stdout


def test_each_file_that_is_done_gets_a_number_of_its_own(tmp_path: Path) -> None:
    """Two processes may finish their last files at the same time."""
    count = (
        "import sys; from pathlib import Path; from support.claims import Claims\n"
        "claims = Claims(Path(sys.argv[1]))\n"
        "sys.stdin.read(1)\n"
        "print(*(claims.finish() for _ in range(300)))"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", count, tmp_path],
            env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for each in processes:
        assert each.stdin is not None
        each.stdin.write("x")
        each.stdin.flush()
    numbers = [int(word) for each in processes for word in each.communicate()[0].split()]
    assert sorted(numbers) == list(range(1, 601))


def test_an_error_of_pytest_itself_is_told(tmp_path: Path) -> None:
    write(tmp_path, "0", "def test_one(): pass")
    (tmp_path / "conftest.py").write_text("def pytest_runtest_makereport(): raise ValueError('no report')")
    done = run(tmp_path)
    assert done.returncode == 3 and "ValueError: no report" in done.stdout
