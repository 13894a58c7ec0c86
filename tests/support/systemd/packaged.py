"""The machine on which the Debian package lives: a clean Debian 13, the package in two versions, and the script.

Owns the root's content besides Debian's.
"""

import shutil
from pathlib import Path

from support.package import older, package_file
from support.systemd.boots import Script, start_with_script

LIFE = Script(
    "support.systemd.package_life",
    "/usr/bin/python3",
    ("listing.py", "systemd/facts.py", "systemd/package_life.py"),
)


def prepare_packaged(root: Path, scratch: Path) -> None:
    """Put the packages into a clean root, and have it run the script.  Raises `CacheError`."""
    package = package_file()
    shutil.copy(package, root / "root/current.deb")
    shutil.copy(older(package, scratch), root / "root/earlier.deb")
    start_with_script(root)
