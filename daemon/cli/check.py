"""`ublkpool backend check`: judges a backend's promises without a kernel, root or daemon."""

import sys
import time
from typing import TYPE_CHECKING

import click

from ublkpool.daemon.cli.complaints import complain
from ublkpool.daemon.cli.options import layer_option, parse_pairs, print_json

if TYPE_CHECKING:
    from ublkpool.daemon.check.check import CheckTransport

_USAGE = 2
_LONG_S = 10.0
_BEAT_S = 10.0


class _Size(click.ParamType[int]):
    name = "SIZE"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from ublkpool.bufpool.sizes import parse_size

        if isinstance(value, int):
            return value
        try:
            return parse_size(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _Progress:
    """One line that is replaced on a terminal; elsewhere a line now and then, in long checks only."""

    def __init__(self, seconds: float) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._is_long = seconds > _LONG_S
        self._next_s = time.monotonic() + _BEAT_S

    def show(self, text: str) -> None:
        if self._is_terminal:
            click.echo(f"\r{text:<110.110}", nl=False, err=True)
        elif self._is_long and time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + _BEAT_S
            click.echo(text, err=True)

    def end(self) -> None:
        if self._is_terminal:
            click.echo(f"\r{'':<110}\r", nl=False, err=True)


def _epilog() -> str:
    from ublkpool.daemon.check.promises import PROMISES

    return "\b\nThe promises:\n" + "\n".join(f"  {name:<14} {promise}" for name, promise in PROMISES.items())


class _Check(click.Command):
    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self.epilog = _epilog()
        super().format_epilog(ctx, formatter)


@click.command(cls=_Check, short_help="Check a backend's promises.")
@click.argument("kind", metavar="KIND|FILE.py")
@click.argument("options", nargs=-1, metavar="[KEY=VALUE ...]")
@click.option(
    "--seconds", type=click.FloatRange(min=0, max=1e7), default=2.0, show_default=True, help="How long."
)
@click.option("--seed", type=click.IntRange(min=0), help="Replays the requests and ends of an earlier check.")
@click.option(
    "--transport",
    type=click.Choice(["ring", "zeromq", "both"]),
    default="both",
    metavar="ring|zeromq|both",
    help="How requests travel.  [default: both, one after the other]",
)
@click.option("--size", type=_Size(), default=0, help="The device's size.  [default: the backend's]")
@click.option("--queues", type=click.IntRange(1, 16), default=2, show_default=True, help="Hardware queues.")
@click.option("--depth", type=click.IntRange(1, 128), default=16, show_default=True, help="Tags of a queue.")
@click.option("--max-io", type=_Size(), default="256K", show_default=True, help="The largest read or write.")
@click.option(
    "--deadline",
    type=click.FloatRange(min=0.1),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="How long a request, a fence or a stop may take.",
)
@click.option(
    "--power-loss",
    default="",
    metavar="COMMAND",
    help="A shell command that loses what the store has not flushed; it runs after each kill, while no backend runs.",
)
@layer_option
@click.option("--allow-errors", is_flag=True, help="Requests may fail; what they changed is then unknown.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def check(
    kind: str,
    options: tuple[str, ...],
    seconds: float,
    seed: int | None,
    transport: "CheckTransport",
    size: int,
    queues: int,
    depth: int,
    max_io: int,
    deadline: float,
    power_loss: str,
    layers: tuple[str, ...],
    allow_errors: bool,
    as_json: bool,
) -> int:
    """Check the promises of a backend, without a kernel, root or daemon.

    Its process is started as `ublkpool backend KIND KEY=VALUE ...` starts it, gets requests of every kind, and is
    killed, stopped and fenced again and again, while a model of the disk judges each answer.  The store is OVERWRITTEN:
    name one that holds nothing.  A backend in another language is named by its whole command line, with {run_dir} and
    {device} in it; it ends with status 1 without rings where it needs them, so say its --transport.

    \b
    ublkpool backend check ./mybackend.py path=/tmp/scratch.img
    ublkpool backend check file path=/tmp/scratch.img size=64M --seconds 60
    ublkpool backend check --transport zeromq './zeromq_disk {run_dir} {device} /tmp/scratch 16777216'

    Exit status: 0 every promise was kept, 1 one was broken, 2 wrong usage or a backend that does not start.
    """
    pairs = parse_pairs(options)
    from ublkpool.daemon.check.process import RUN_DIR

    if layers and RUN_DIR in kind:
        raise click.UsageError(
            f"--layer {layers[0]} is for a KIND or FILE.py, not for a program's command line"
        )
    import secrets

    from ublkpool.daemon.check.check import CheckOptions, run_check
    from ublkpool.daemon.check.host import NotStarted

    asked = CheckOptions(
        seconds=seconds,
        seed=secrets.randbelow(1 << 32) if seed is None else seed,
        transport=transport,
        size_bytes=size,
        queues=queues,
        depth=depth,
        max_io_bytes=max_io,
        deadline_s=deadline,
        power_loss=power_loss,
        allows_errors=allow_errors,
        layers=layers,
    )
    progress = _Progress(seconds)
    try:
        report = run_check(kind, pairs, asked, progress.show)
    except NotStarted as error:
        complain([f"check {kind}: the backend does not start: {error}"])
        return _USAGE
    finally:
        progress.end()
    if as_json:
        print_json(report)
    else:
        click.echo("\n".join(report.lines()))
    return 0 if report.is_kept else 1
