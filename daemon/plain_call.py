"""A call that another process of the daemon can make though it was forked before."""

from collections.abc import Callable, Sequence
from typing import Any


class Call:
    """A function of a module, or a callable object, and its arguments: all can be pickled.

    The function gets the descriptors `fds` first, under the numbers that they have in the process that makes the call;
    they are closed there after the call.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any, fds: Sequence[int] = ()) -> None:
        self.function = function
        self.arguments = arguments
        self.fds = tuple(fds)

    def __call__(self) -> Any:
        """Make the call in this process."""
        return self.function(*self.fds, *self.arguments)
