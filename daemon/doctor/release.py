"""The version of a kernel, from `uname -r` and, on Ubuntu, from /proc/version_signature.  Pure."""

import re
from typing import NamedTuple

Version = tuple[int, int, int]
_RELEASE = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?(.*)", re.DOTALL)
_BUILD = re.compile(r"-(\d+)-([a-z][a-z0-9-]*)\Z")
_CANDIDATE = re.compile(r"-rc(\d+)")


class Release(NamedTuple):
    """A kernel.  `version` is upstream's, as far as the distribution tells it.

    `build` and `flavour` are a distribution's: 1015 and azure of 6.17.0-1015-azure; -1 and empty for other kernels.
    `candidate` is n of -rcn, 0 for a release.
    """

    text: str
    version: Version
    build: int = -1
    flavour: str = ""
    candidate: int = 0


def parse_release(text: str, signature: str = "") -> Release | None:
    """The kernel of this `uname -r`; None if it does not begin with a version.

    `signature` is the text of /proc/version_signature: "Ubuntu RELEASE UPSTREAM".
    """
    version = _version(text)
    if version is None:
        return None
    words = signature.split()
    upstream = _version(words[2]) if len(words) == 3 and words[0] == "Ubuntu" else None
    build, candidate = _BUILD.search(text), _CANDIDATE.search(text)
    return Release(
        text,
        upstream or version,
        int(build[1]) if build else -1,
        build[2] if build else "",
        int(candidate[1]) if candidate else 0,
    )


def _version(text: str) -> Version | None:
    match = _RELEASE.match(text)
    return (int(match[1]), int(match[2]), int(match[3] or 0)) if match else None
