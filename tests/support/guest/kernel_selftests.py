"""Fetches the kernel's ublk selftests into the cache from Debian's linux-source; this repository contains none.

The package is fetched and checked like the test guest's.  The cached directory is complete, because it is made under a
temporary name and renamed last.
"""

import os
import shutil
import subprocess
from pathlib import Path

from support.guest.apt_archive import Archive, Package
from support.guest.cache import default_cache

SUITE = "trixie-backports"
PATTERN = r"linux-source-\d+\.\d+"
IN_THE_SOURCE = "tools/testing/selftests/ublk"


def selftests_path() -> Path:
    """The directory of the selftests after a fetch."""
    return default_cache() / "selftests"


def unpack_selftests(archive: Archive, tree: Path) -> tuple[Path, Package]:
    """Unpack the newest kernel's selftests into an empty directory; returns their path in it and their package."""
    package = archive.newest(SUITE, PATTERN)
    deb = archive.download(package)
    subprocess.run(["dpkg", "-x", deb, tree], check=True)
    deb.unlink()
    packed = next((tree / "usr/src").glob("linux-source-*.tar.xz"))
    subprocess.run(["tar", "-C", tree, "-xf", packed, "--wildcards", f"*/{IN_THE_SOURCE}"], check=True)
    packed.unlink()
    return next(tree.glob(f"linux-source-*/{IN_THE_SOURCE}")), package


def fetch_selftests() -> Path:
    """Fetch the selftests unless the cache has them; returns their directory.  Raises `ArchiveError`."""
    path = selftests_path()
    if path.is_dir():
        return path
    staging = path.with_name(f"selftests-{os.getpid()}.partial")
    staging.mkdir(parents=True)
    try:
        (staging / "tree").mkdir()
        source, package = unpack_selftests(Archive.of_this_host(staging), staging / "tree")
        (source / "package").write_text(f"{package.name} {package.version}\n")
        # Another fetch may have finished first.
        if not path.is_dir():
            source.rename(path)
    finally:
        shutil.rmtree(staging)
    print(f"guest: the kernel's selftests are ready in {path}", flush=True)
    return path
