"""The option `--watch [SECONDS]`, whose value may be left out before a device's name."""

import re

import click

SECONDS_DEFAULT = 1.0
SECONDS_MIN = 0.1
SECONDS_MAX = 86400.0
_NUMBER = re.compile(r"-?(\d+(\.\d*)?|\.\d+)\Z", re.ASCII)
_WATCH = "--watch"


def check_seconds(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """The option's callback.  Raises `click.BadParameter`."""
    if value is None:
        return None
    if _NUMBER.match(value) and SECONDS_MIN <= float(value) <= SECONDS_MAX:
        return float(value)
    raise click.BadParameter(
        f"{value!r}: expected seconds from {SECONDS_MIN:g} to {SECONDS_MAX:g}, such as 1 or 0.5",
        ctx=ctx,
        param=param,
    )


class WatchCommand(click.Command):
    """A command with `--watch [SECONDS]`: a word after it that is no number is the next argument."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Give a bare `--watch` its default, since an option of click takes the next word whatever it is."""
        end = args.index("--") if "--" in args else len(args)
        for index in range(end):
            followed_by = args[index + 1] if index + 1 < end else ""
            if args[index] == _WATCH and not _NUMBER.match(followed_by):
                args = [*args[:index], f"{_WATCH}={SECONDS_DEFAULT:g}", *args[index + 1 :]]
        return super().parse_args(ctx, args)
