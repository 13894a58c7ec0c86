"""Builds kublk in the cache from Debian's packages, so that this repository contains no kernel source.

The packages are fetched and checked like the test guest's.  A part that exists is complete, because it is built under
another name and renamed last.
"""

import shutil
import subprocess
from pathlib import Path

from support.guest.apt_archive import Archive
from support.guest.cache import default_cache
from support.guest.kernel_selftests import unpack_selftests

# The newest kernel's source and headers; a liburing with all functions that kublk calls, linked statically.
_PACKAGES = (
    ("trixie-backports", "linux-libc-dev"),
    ("trixie", "liburing-dev"),
)
_LIBRARY = "usr/lib/x86_64-linux-gnu/liburing.a"
_INCLUDES = ("usr/include", "usr/include/x86_64-linux-gnu")
# Another program in the same folder.
_NOT_KUBLK = "metadata_size.c"


class KublkError(Exception):
    """kublk cannot be built; the text is one line."""


def kublk_path() -> Path:
    """The path of kublk, which `build_kublk` makes."""
    return default_cache().with_name("ublkpool-bench") / "kublk" / "kublk"


def build_kublk() -> Path:
    """Fetch and build kublk; returns its path.  Raises `ArchiveError` or `KublkError`."""
    path = kublk_path()
    if path.exists():
        return path
    staging = path.parent.with_name("kublk.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    tree, source, versions = _unpacked(staging)
    _compile(tree, source, staging / "kublk")
    shutil.rmtree(tree)
    (staging / "packages").write_text("\n".join(versions) + "\n")
    staging.rename(path.parent)
    return path


def _unpacked(staging: Path) -> tuple[Path, Path, list[str]]:
    archive = Archive.of_this_host(staging)
    tree = staging / "tree"
    tree.mkdir()
    source, kernel = unpack_selftests(archive, tree)
    versions = [f"{kernel.name} {kernel.version}"]
    for suite, pattern in _PACKAGES:
        package = archive.newest(suite, pattern)
        deb = archive.download(package)
        subprocess.run(["dpkg", "-x", deb, tree], check=True)
        deb.unlink()
        versions.append(f"{package.name} {package.version}")
    return tree, source, versions


def _compile(tree: Path, source: Path, target: Path) -> None:
    files = sorted(each for each in source.glob("*.c") if each.name != _NOT_KUBLK)
    includes = [word for each in _INCLUDES for word in ("-isystem", str(tree / each))]
    command: list[str | Path] = [
        "gcc",
        "-O3",
        "-D_GNU_SOURCE=",
        *includes,
        "-o",
        target,
        *files,
        tree / _LIBRARY,
        "-lpthread",
        "-lm",
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode:
        raise KublkError(f"kublk does not compile: {' '.join(built.stderr.split())[:300]}")
