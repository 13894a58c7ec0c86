"""Fetches nbdkit's own Python plugins into the cache from Debian's source package; this repository contains none.

The package is fetched and checked like the test guest's.  The cached directory is complete, because it is made under a
temporary name and renamed last.
"""

import shutil
import subprocess
import tempfile
from pathlib import Path

from support.guest.apt_archive import OS_RELEASE, Archive, ArchiveError, release_codename
from support.guest.cache import default_cache

NAME = "nbdkit"
OTHER_SUITE = "trixie"
"""Taken if the mirror has no source package of this machine's own release."""
_WANTED = (
    "*/plugins/python/examples/*.py",
    "*/plugins/S3/S3.py",
    "*/tests/*python*.py",
    "*/tests/shebang.py",
)


def plugins_path() -> Path:
    """The directory of the plugins after a fetch."""
    return default_cache() / "nbdkit-plugins"


def fetch_plugins() -> Path:
    """Fetch the plugins unless the cache has them; returns their directory.  Raises `ArchiveError`."""
    path = plugins_path()
    if path.is_dir():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f"{path.name}-", suffix=".partial", dir=path.parent))
    (staging / "plugins").mkdir()
    try:
        tarball = _download(Archive.of_this_host(staging))
        unpack = [
            "tar",
            "-C",
            str(staging / "plugins"),
            "-xf",
            str(tarball),
            "--strip-components=1",
            "--wildcards",
        ]
        subprocess.run([*unpack, *_WANTED], check=True)
        try:
            (staging / "plugins").rename(path)
        except OSError:
            # Another fetch has finished first.
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(staging)
    print(f"guest: nbdkit's Python plugins are ready in {path}", flush=True)
    return path


def _download(archive: Archive) -> Path:
    problems = []
    for suite in dict.fromkeys((release_codename(OS_RELEASE.read_text()), OTHER_SUITE)):
        try:
            return archive.download(archive.newest_source(suite, NAME))
        except ArchiveError as problem:
            problems.append(str(problem))
    raise ArchiveError("; ".join(problems))
