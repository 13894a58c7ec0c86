"""Runs of the command line in this process: what a command printed, and how it complained."""

from pathlib import Path

from click.testing import CliRunner, Result

from ublkpool.daemon.cli.commands import cli


def run(*args: str, run_dir: Path | None = None) -> Result:
    env = {"UBLKPOOL_RUN_DIR": str(run_dir) if run_dir else None, "UBLKPOOL_DEBUG": None}
    return CliRunner(env=env).invoke(cli, args, prog_name="ublkpool")


def complaint(result: Result, status: int) -> str:
    """The one line on stderr of a command that failed with this status."""
    assert (result.exit_code, result.stdout) == (status, "")
    assert result.stderr.startswith("ublkpool: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("ublkpool: ").rstrip("\n")
