"""The promises that a backend makes, by name, and what is said of a broken one.  Pure."""

from typing import NamedTuple

PROMISES = {
    "attach": "it attaches as the daemon wants it, at the start and after each of its ends",
    "size": "each block up to its size can be read and written, and the size stays",
    "identity": "its successor brings the same store",
    "answers": "each request is answered once and in time",
    "protocol": "it sends nothing that gets it cut off",
    "alive": "its process lives until it is told to end",
    "stop": "SIGTERM and detach end its process, with status 0 and in time",
    "errors": "no request on its blocks fails",
    "whole": "a read or write moves all of its bytes",
    "last-write": "a read returns what was written last",
    "offset": "data stays at the offset that it was written to",
    "neighbours": "a request changes its own blocks only",
    "zeroes": "WRITE_ZEROES makes its blocks read as zeros",
    "survives-kill": "an answered write survives the death of the backend's process",
    "survives-stop": "an answered write survives the backend's stop by SIGTERM",
    "flush": "what was answered before a FLUSH survives, once the FLUSH is answered",
    "fua": "a write with FUA survives, once it is answered",
    "fence": "nothing of an old epoch runs after FENCED",
    "predecessor": "a request of a dead process changes nothing after its successor's answers",
}
"""Each promise's name, and the promise."""


class Broken(Exception):
    """A promise was broken; `what` says how, in a sentence."""

    def __init__(self, promise: str, what: str) -> None:
        super().__init__(f"{promise}: {what}")
        self.promise, self.what = promise, what


class Place(NamedTuple):
    """Where in the run something happened: the round's transport and placement, and the last events, oldest first."""

    round: str
    events: tuple[str, ...]
