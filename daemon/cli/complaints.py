"""Errors of a command as lines on stderr.

Each line begins with `ublkpool: `.  A line that goes to systemd's journal also carries its priority.
"""

import os
import sys
from collections.abc import Sequence

import click


def usage_line(error: click.ClickException) -> str:
    """click's error in one line, with the command whose help explains the usage."""
    context = getattr(error, "ctx", None)
    hint = f" (see {context.command_path} --help)" if context is not None else ""
    return " ".join(error.format_message().split()) + hint


def failed(error: Exception) -> int:
    """Print the error, after its traceback if UBLKPOOL_DEBUG=1; returns the exit status."""
    from ublkpool.daemon.errors import lines_of, status_of

    if os.environ.get("UBLKPOOL_DEBUG") == "1":
        import traceback

        _print_error("".join(traceback.format_exception(error)).rstrip("\n"))
    complain(lines_of(error))
    return status_of(error)


def complain(lines: Sequence[str]) -> None:
    """Print these lines as errors of `ublkpool`."""
    for line in lines:
        _print_error(f"ublkpool: {line}")


def _print_error(text: str) -> None:
    from ublkpool.daemon import journal

    click.echo(
        journal.with_priority(text, journal.ERROR) if journal.is_journal(sys.stderr) else text, err=True
    )
