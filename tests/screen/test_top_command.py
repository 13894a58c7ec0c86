"""`ublkpool top` as a command: what it refuses in one line, and what it imports."""

import locale
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from ublkpool.daemon.cli.commands import cli
from ublkpool.daemon.cli.top.terminal import marks
from ublkpool.daemon.cli.top.text import ASCII, UNICODE

DEADLINE_S = 120


def complaint(*args: str) -> str:
    """The one line of a command that was used wrongly."""
    result = CliRunner().invoke(cli, ["top", *args])
    assert result.exit_code == 2 and result.stdout == ""
    [line] = result.stderr.splitlines()
    return line


def test_without_a_terminal_one_line_names_the_command_for_scripts(tmp_path: Path) -> None:
    line = complaint("--run-dir", str(tmp_path))
    assert line.startswith("ublkpool: top needs a terminal") and "ublkpool stats --watch" in line
    assert "stdin, stdout and stderr" in line


def test_without_the_package_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "textual", None)
    line = complaint()
    assert "pip install 'ublkpool[top]'" in line and "ublkpool stats --watch" in line
    assert '"The Debian package" in docs/OPERATIONS.md' in line, "its environment has no pip"


def test_a_column_that_is_none_is_refused_with_those_that_are() -> None:
    line = complaint("--sort", "speed")
    assert "'speed'" in line and "R/S" in line and "P99" in line
    assert "top needs a terminal" in complaint("--sort", "r p99"), "any case will do"


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "x", "86401", "", "1e1"])
def test_seconds_that_are_none_are_refused(seconds: str) -> None:
    assert "expected seconds from 0.1 to 86400" in complaint(f"--interval={seconds}")


@pytest.mark.parametrize(
    ("codeset", "term", "is_ascii", "is_plain"),
    [
        ("UTF-8", "xterm", False, False),
        ("UTF-8", "xterm", True, True),
        ("UTF-8", "linux", False, True),
        ("ISO-8859-1", "xterm", False, True),
        ("ANSI_X3.4-1968", "xterm", False, True),
    ],
)
def test_a_terminal_gets_the_characters_that_it_can_show(
    monkeypatch: pytest.MonkeyPatch, codeset: str, term: str, is_ascii: bool, is_plain: bool
) -> None:
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(locale, "nl_langinfo", lambda item: codeset)
    monkeypatch.setattr(locale, "setlocale", lambda *args: "C")
    assert marks(is_ascii) is (ASCII if is_plain else UNICODE)


PROBE = """
import sys
from ublkpool.daemon.cli.commands import cli
for args in (["--help"], ["top", "--help"], ["list"], ["stats"], ["top"], ["top", "--sort", "no"]):
    try:
        cli.main([*args, *(["--run-dir", sys.argv[1]] if "--help" not in args else [])], prog_name="ublkpool")
    except SystemExit:
        pass
    slow = sorted({"textual", "rich", "asyncio", "ublkpool.daemon.cli.top.app"} & set(sys.modules))
    assert not slow, (args, slow)
print("done")
"""


def test_the_library_is_imported_when_the_screen_is_drawn_and_not_before(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        stdin=subprocess.DEVNULL,
    )
    assert done.stdout.splitlines()[-1:] == ["done"], done.stderr
