"""Where Ceph's programs are: unpacked by support/setup_host.sh, so that no package of a server is installed.

Owns the layout of that directory.  The libraries that the programs need are installed packages.
"""

import os
from pathlib import Path


class ProgramsMissing(Exception):
    """The programs are not in the cache."""


def ceph_root() -> Path:
    """The directory with the programs' `usr`."""
    base = os.environ.get("UBLKPOOL_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    found = sorted((Path(base) / "ublkpool-ceph").glob("[0-9]*"))
    if not found:
        raise ProgramsMissing(f"no Ceph in {base}/ublkpool-ceph: run `make setup`")
    return found[-1]


def program(name: str) -> str:
    """The path of one program, such as ceph-osd or rbd."""
    return str(ceph_root() / "usr/bin" / name)


def library_settings() -> dict[str, str]:
    """The settings that lead the servers to what they load at run time."""
    library = next((ceph_root() / "usr/lib").glob("*-linux-gnu"))
    return {
        "plugin_dir": str(library / "ceph"),
        "erasure_code_dir": str(library / "ceph/erasure-code"),
        "osd_class_dir": str(library / "rados-classes"),
    }
