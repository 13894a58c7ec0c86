"""Write a man page for each command into the folder that is the only argument: what click-man makes of the help."""

import re
import sys
from pathlib import Path

import click
from click_man.core import write_man_pages

from ublkpool import __version__
from ublkpool.daemon.cli.commands import cli

_UNFILLED = re.compile(r"^(\.PP\n)?\x08\n(.*?)(?=^\.|\Z)", re.MULTILINE | re.DOTALL)


def main(folder: Path) -> None:
    """The commands are loaded when they run, so click-man, which looks only at `commands`, is given them."""
    context = click.Context(cli, info_name="ublkpool")
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        cli.add_command(command, name)
    write_man_pages("ublkpool", cli, version=__version__, target_dir=str(folder))
    # A command of two words, which is not in the group's list.
    name, check, _ = cli.resolve_command(context, ["backend", "check"])
    assert name is not None and check is not None
    write_man_pages(name, check, parent_ctx=context, version=__version__, target_dir=str(folder))
    for page in folder.glob("*.1"):
        page.write_text(_as_written(page.read_text()))


def _as_written(text: str) -> str:
    r"""Keep the lines of paragraphs that click's help marks with \b, and a backslash or a leading dot as it is."""
    return _UNFILLED.sub(lambda found: f"{found[1] or ''}.nf\n{found[2].rstrip()}\n.fi\n", text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
