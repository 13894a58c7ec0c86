"""The command line, a contract: `ublkpool serve | add | del | rebind | set | list | stats | events | metrics | ...`.

Owns the list of commands and what becomes of an error: lines on stderr and an exit status (0 done, 1 failed, 2 wrong
usage or config, 130 interrupted).  Imports a command's module only when that command runs or the help lists it, because
a client command must start fast.
"""

import sys
from importlib import import_module
from typing import Any, NoReturn

import click

from ublkpool import __version__
from ublkpool.daemon.cli.complaints import complain, failed, usage_line

INTERRUPTED = 130
_COMMANDS = {
    "serve": "serve:serve",
    "add": "add:add",
    "del": "devices:delete",
    "rebind": "devices:rebind",
    "set": "set:set_device",
    "drain": "drain:drain",
    "resume": "drain:resume",
    "reload": "reload:reload",
    "resize": "resize:resize",
    "list": "devices:list_devices",
    "stats": "devices:stats",
    "top": "top.command:top",
    "events": "events:events",
    "backend": "attach:backend",
    "volume": "volume:volume",
    "metrics": "metrics:metrics",
    "shutdown": "serve:shutdown",
    "client": "attach:client",
    "features": "features:features",
    "doctor": "doctor:doctor",
    "node-owner": "node_owner:node_owner",
}
"""The module below `ublkpool.daemon.cli` and the function of each command, in the order of the help."""


_SUBCOMMANDS: dict[tuple[str, ...], str] = {("backend", "check"): "check:check"}
"""Commands of two words; any other second word is an argument of the first."""


class _Commands(click.Group):
    """Turns every error of a command into lines on stderr and an exit status."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        kwargs["standalone_mode"] = False
        try:
            status = super().main(*args, **kwargs)
        except click.Abort:
            sys.exit(INTERRUPTED)
        except click.ClickException as error:
            complain([usage_line(error)])
            sys.exit(error.exit_code)
        except Exception as error:
            sys.exit(failed(error))
        sys.exit(status or 0)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        return _command(_COMMANDS[cmd_name])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if (found := _SUBCOMMANDS.get(tuple(args[:2]))) is not None:
            return " ".join(args[:2]), _command(found), args[2:]
        return super().resolve_command(ctx, args)


def _command(where: str) -> click.Command:
    module, function = where.split(":")
    command = getattr(import_module(f"ublkpool.daemon.cli.{module}"), function)
    assert isinstance(command, click.Command)
    return command


@click.group(cls=_Commands, no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ublkpool", message="%(prog)s %(version)s")
def cli() -> None:
    """Serve Linux block devices from user space, through ublk.

    \b
    One terminal:      ublkpool serve
    Another:           ublkpool add vol0 --size 1G --backend memory
                       mkfs.ext4 /dev/ublkb0 && mount /dev/ublkb0 /mnt
    In the end:        umount /mnt && ublkpool del vol0

    Exit status: 0 done, 1 failed, 2 wrong usage or config.  UBLKPOOL_DEBUG=1 adds a traceback to errors.
    """


def main() -> NoReturn:
    """The console script."""
    cli.main(prog_name="ublkpool")
