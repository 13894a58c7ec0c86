"""`ublkpool backend check` as a command: its report, its exit status, its help."""

import json
import subprocess
import sys
from pathlib import Path

DEFECTS = Path(__file__).parent / "defects"


def check(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "ublkpool.daemon", "backend", "check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_kept_promise_is_told_in_one_line() -> None:
    done = check("null", "--seconds", "0", "--seed", "5", "--transport", "ring")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("check null: every promise was kept with placement backend and pool (")
    assert done.stdout.endswith(", seed 5)\n")


def test_a_broken_promise_is_told_with_the_command_that_finds_it_again() -> None:
    file = str(DEFECTS / "answers_twice.py")
    done = check(file, "--seed", "3", "--deadline", "20")
    lines = done.stdout.splitlines()
    assert done.returncode == 1
    assert lines[0] == f"check {file}: broken promise protocol: it sends nothing that gets it cut off"
    assert lines[1].startswith("  it is cut off on queue ")
    assert lines[-1] == f"  again: ublkpool backend check --seed 3 --deadline 20 {file}"


def test_a_report_can_be_json(tmp_path: Path) -> None:
    done = check(str(DEFECTS / "answers_twice.py"), "--json")
    assert (done.returncode, json.loads(done.stdout)["promise"]) == (1, "protocol")


def test_a_backend_that_does_not_start_is_wrong_usage(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("this is no Python\n")
    for arguments in (["nosuch"], [str(broken)], ["file"], ["file", f"path={tmp_path}/no/disk", "size=4M"]):
        done = check(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith(f"ublkpool: check {arguments[0]}: the backend does not start: ")


def test_a_store_smaller_than_the_device_is_wrong_usage(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    done = check("file", f"path={disk}", "--size", "2M")
    assert done.returncode == 2
    assert "fewer than size=2M (2097152)" in done.stderr


def test_a_layer_that_cannot_be_is_wrong_usage() -> None:
    done = check("null", "--layer", "nosuch")
    assert done.returncode == 2 and "nosuch" in done.stderr
    done = check("--layer", "readonly", "./disk {run_dir} {device}")
    assert done.returncode == 2 and "--layer readonly is for a KIND or FILE.py" in done.stderr


def test_the_help_lists_the_promises() -> None:
    done = check("--help")
    assert done.returncode == 0
    assert "survives-kill" in done.stdout and "OVERWRITTEN" in done.stdout
