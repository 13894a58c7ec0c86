"""What several commands share: `--run-dir`, `--json`, KEY=VALUE arguments, and the connection to the daemon."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ublkpool import RUN_DIR_DEFAULT
from ublkpool.daemon.cli.complaints import complain

if TYPE_CHECKING:
    from ublkpool.client import Client
    from ublkpool.daemon.settings.listen import ListenAddress

METRICS_PACKAGES = ("prometheus_client", "h11")
"""What the extra `metrics` brings."""
_Command = Callable[..., Any]


def check_directory(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """An option's directory as an absolute path; the callback of `--run-dir` and `--state-dir`.

    Raises `click.BadParameter` for the current directory (also named by '') and for a path too long for sockets.
    """
    if value == Path():
        raise click.BadParameter("names the current directory: name one of its own, such as /run/ublkpool")
    if value is None:
        return None
    # Imported here, because `--help` needs no directory.
    from ublkpool.bufpool.way_out import too_long_for_sockets

    if reason := too_long_for_sockets(value.absolute()):
        raise click.BadParameter(reason, ctx=ctx, param=param)
    return value.absolute()


def _usual_run_dir() -> Path:
    from ublkpool.daemon.settings.user_directories import usual_run_dir

    return usual_run_dir()


def run_dir_option(
    default: Callable[[], Path] | None = _usual_run_dir,
) -> Callable[[_Command], _Command]:
    """`--run-dir`; without a default, the config file's directory is used."""
    own = f"an ordinary user's own daemon has $XDG_RUNTIME_DIR/{RUN_DIR_DEFAULT.name}"
    shown = ("" if default else "the config's, or ") + f"{RUN_DIR_DEFAULT}; {own}"
    return click.option(
        "--run-dir",
        # The sockets in it decide who gets in: another user may pass through it without reading it.
        type=click.Path(path_type=Path, readable=False),
        envvar="UBLKPOOL_RUN_DIR",
        default=default,
        callback=check_directory,
        help=f"Directory of the daemon's sockets; also read from UBLKPOOL_RUN_DIR.  [default: {shown}]",
    )


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")

layer_option = click.option(
    "--layer",
    "layers",
    multiple=True,
    metavar="NAME:KEY=VALUE,...",
    help="A layer over the backend: cache, fault, log, readonly or FILE.py.  May be repeated; the first gets each "
    "request first.",
)


def parse_pairs(options: Sequence[str]) -> dict[str, str | list[str]]:
    """KEY=VALUE arguments as a dictionary; a key that is given again has a list.  Raises `click.UsageError`."""
    pairs: dict[str, str | list[str]] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not key or not equals:
            raise click.UsageError(f"expected KEY=VALUE, got {option!r}")
        if key == "kind":
            raise click.UsageError("kind= is no option: it is the KIND")
        earlier = pairs.get(key)
        if earlier is None:
            pairs[key] = value
        else:
            pairs[key] = [*([earlier] if isinstance(earlier, str) else earlier), value]
    return pairs


def admin_client(run_dir: Path) -> "Client":
    """A connection to the daemon in this run directory; it shows progress only on a terminal."""
    from ublkpool.client import Client

    def show_progress(text: str) -> None:
        if sys.stderr.isatty():
            click.echo(text, err=True)

    def warn(text: str) -> None:
        complain([text])

    return Client(run_dir, show_progress, warn)


def listen_address(listen: str, run_dir: Path) -> "ListenAddress":
    """The address of an option.  Raises `click.UsageError`."""
    from ublkpool.daemon.settings.listen import parse_listen

    try:
        return parse_listen(listen, run_dir)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def check_library() -> None:
    """Raise `click.UsageError` if this environment lacks what serves metrics."""
    from importlib.util import find_spec

    for name in METRICS_PACKAGES:
        if find_spec(name) is None:
            raise click.UsageError(f"metrics need the Python package {name}: pip install 'ublkpool[metrics]'")


def print_json(value: object) -> None:
    """Print the value as indented JSON."""
    import msgspec

    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2))
