"""The guest's parts on this machine: QEMU, virtiofsd and kernels, fetched once into a cache directory.

Owns the cache's layout. Each part is unpacked under a temporary name and renamed last, so a part that exists is
complete; an interrupted fetch leaves only `*.partial` behind, which the next fetch removes.
"""

import fcntl
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from support.guest.apt_archive import OS_RELEASE, Archive, Package

KERNELS = ("6.12", "7.3")
# The first Debian whose QEMU works here: that of Debian 12 miscomputes cmpxchg16b under TCG, and 6.12 guests die.
DEBIAN_WITH_GOOD_QEMU = 13


@dataclass(frozen=True)
class Wanted:
    """A package of a part: the suite it is taken from and the regular expression its name must match."""

    suite: str
    pattern: str


# Only Debian 12's QEMU packages still carry the C virtiofsd; it serves QEMU 10 as well.
PARTS: dict[str, tuple[Wanted, ...]] = {
    "qemu": (
        Wanted("bookworm-backports", "qemu-system-x86"),
        Wanted("bookworm-backports", "qemu-system-data"),
        Wanted("bookworm-backports", "seabios"),
    ),
    "virtiofsd": (Wanted("bookworm", "qemu-system-common"),),
    "kernel-6.12": (Wanted("trixie", r"linux-image-6\.12\.\d+\+deb13-cloud-amd64"),),
    "kernel-7.3": (
        Wanted("trixie-backports", r"linux-binary-7\.3\.\d+\+deb13-cloud-amd64"),
        Wanted("trixie-backports", r"linux-modules-7\.3\.\d+\+deb13-cloud-amd64"),
    ),
}


class CacheError(Exception):
    """A part is missing, or this machine cannot use it."""


@dataclass(frozen=True)
class Emulator:
    """The paths of QEMU and virtiofsd."""

    qemu: Path
    firmware_dirs: tuple[Path, ...]
    virtiofsd: Path
    virtiofsd_is_rust: bool


@dataclass(frozen=True)
class Kernel:
    """One unpacked kernel; `module_root` is what modprobe's -d takes."""

    image: Path
    module_root: Path
    release: str


def default_cache() -> Path:
    """`$UBLKPOOL_CACHE` or the XDG cache directory, in either case a folder of our own in it."""
    base = os.environ.get("UBLKPOOL_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).absolute() / "ublkpool-guest"


def debian_version(os_release: str) -> int:
    """The Debian release in an os-release text; testing, which has no number, counts as the newest."""
    if not re.search(r"^ID=debian$", os_release, re.MULTILINE):
        return 0
    match = re.search(r'^VERSION_ID="?(\d+)', os_release, re.MULTILINE)
    return int(match.group(1)) if match else 999


def uses_host_qemu() -> bool:
    """Whether the distribution's QEMU and virtiofsd are good enough."""
    return debian_version(OS_RELEASE.read_text()) >= DEBIAN_WITH_GOOD_QEMU


class GuestCache:
    """The cache directory."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or default_cache()

    def fetch(self) -> None:
        """Fetch every missing part. Safe to interrupt, and to run twice at the same time."""
        if not self._missing():
            return
        if platform.machine() != "x86_64":
            raise CacheError(f"the test guest is x86_64 only, this machine is {platform.machine()}")
        self.root.mkdir(parents=True, exist_ok=True)
        with self.lock():
            for stale in self.root.glob("*.partial"):
                shutil.rmtree(stale)
            if missing := self._missing():
                self._fetch_parts(missing)

    def kernel(self, version: str) -> Kernel:
        """The cached kernel of a series, such as 6.12."""
        root = self._part(f"kernel-{version}") / "usr"
        release = next((root / "lib/modules").iterdir()).name
        images = [root / "lib/modules" / release / "vmlinuz", root.parent / "boot" / f"vmlinuz-{release}"]
        return Kernel(next(path for path in images if path.exists()), root, release)

    def emulator(self) -> Emulator:
        """The QEMU to run: the distribution's if it is good enough, else the cached one."""
        if uses_host_qemu():
            return Emulator(
                Path("/usr/bin/qemu-system-x86_64"),
                (),
                Path("/usr/libexec/virtiofsd"),
                virtiofsd_is_rust=True,
            )
        usr = self._part("qemu") / "usr"
        return Emulator(
            usr / "bin/qemu-system-x86_64",
            (usr / "share/seabios", usr / "share/qemu"),
            self._part("virtiofsd") / "usr/lib/qemu/virtiofsd",
            virtiofsd_is_rust=False,
        )

    def _part(self, name: str) -> Path:
        path = self.root / name
        if not path.is_dir():
            raise CacheError(f"{path} is missing: run `make guest`")
        return path

    def _missing(self) -> list[str]:
        names = [name for name in PARTS if name.startswith("kernel") or not uses_host_qemu()]
        return [name for name in names if not (self.root / name).is_dir()]

    def _fetch_parts(self, names: list[str]) -> None:
        scratch = self.root / "downloads.partial"
        scratch.mkdir()
        archive = Archive.of_this_host(scratch)
        for name in names:
            staging = self.root / f"{name}.partial"
            packages = [archive.newest(wanted.suite, wanted.pattern) for wanted in PARTS[name]]
            unpack(packages, staging, archive.download)
            if name.startswith("kernel"):
                index_modules(staging / "usr")
            (staging / "packages").write_text("".join(f"{p.filename} {p.sha256}\n" for p in packages))
            os.sync()
            staging.rename(self.root / name)
            print(f"guest: {name} is ready", flush=True)
        shutil.rmtree(scratch)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the cache for changes."""
        with (self.root / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("guest: another fetch is running, waiting for it", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def unpack(packages: list[Package], into: Path, download: Callable[[Package], Path]) -> None:
    """Put the files of all packages into one tree; their maintainer scripts are not run."""
    into.mkdir()
    for package in packages:
        deb = download(package)
        subprocess.run(["dpkg", "-x", deb, into], check=True)
        deb.unlink()


def index_modules(root: Path) -> None:
    """Write modules.dep and the other indexes, which a package leaves to its maintainer script."""
    release = next((root / "lib/modules").iterdir()).name
    # depmod warns about a modules package without the kernel's modules.builtin; the result works.
    depmod = subprocess.run(["depmod", "-b", root, release], capture_output=True, text=True)
    if depmod.returncode != 0:
        raise CacheError(f"depmod failed: {depmod.stderr}")
