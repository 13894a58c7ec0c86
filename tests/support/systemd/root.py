"""A bootable Debian 13 for the systemd guest: made once in the cache, copied for each run, with the checkout installed.

Owns the root's content.  The base comes from the mirror of this host's apt, checked by debootstrap against Debian's
keyring; Python packages come through this host's pip.  All mounts are made in a mount namespace of their own, so that
the host keeps none.  Needs root.
"""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from support.guest.apt_archive import (
    KEYRING,
    OS_RELEASE,
    apt_proxies,
    candidate_mirrors,
    read_sources,
    release_codename,
)
from support.guest.cache import KERNELS, CacheError, GuestCache

PROJECT = Path(__file__).parents[3]
SUITE = "trixie"
PYTHON = "3.13"
PACKAGES = (
    *("systemd", "systemd-sysv", "udev", "dbus", "libpam-systemd", "kmod", "procps", "e2fsprogs", "fio"),
    *("cryptsetup-bin", "lvm2", "mdadm"),
    *("python3", "python3-venv", "python3-dev", "gcc", "libc6-dev", "liburing-dev", "pkg-config"),
)
BUILD_PACKAGES = ("setuptools>=77", "cffi>=1.17")
# pip accepts a wheel for any of these.
PLATFORMS = ("manylinux2014_x86_64", *(f"manylinux_2_{minor}_x86_64" for minor in (5, 17, 26, 28)))
# Units that the guest does not need and that would slow its boot: network, timers, consoles.
MASKED = (
    *("systemd-networkd.service", "systemd-timesyncd.service", "systemd-pstore.service", "ldconfig.service"),
    *("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer"),
    *("e2scrub_reap.service", "fstrim.timer", "systemd-hwdb-update.service", "systemd-update-done.service"),
    *("systemd-journal-catalog-update.service", "modprobe@efi_pstore.service", "getty@tty1.service"),
    *("proc-sys-fs-binfmt_misc.automount", "serial-getty@ttyS0.service"),
    *("lvm2-monitor.service", "mdmonitor.service", "mdcheck_start.timer", "mdmonitor-oneshot.timer"),
)
SOURCES = (
    *("pyproject.toml", "setup.py", "README.md", "CHANGELOG.md", "SECURITY.md", "LICENSE"),
    *("src", "config", "docs", "examples"),
)
PARTS = ("backends", "bufpool", "daemon", "ublk", "workers")
WHEELS = "root/wheels"
DROP_INS = "/etc/systemd/system/ublkpool.service.d"
_LAYOUT = 1
"""Increase this when the build changes other than by the lists above."""


class SystemdRoot:
    """The cached root, and copies of it."""

    def __init__(self, cache: GuestCache) -> None:
        self._cache = cache

    @property
    def path(self) -> Path:
        """The path of the cached root, which may not exist yet."""
        made_of = [_LAYOUT, SUITE, PACKAGES, MASKED, BUILD_PACKAGES, dependencies()]
        made_of += [self._cache.kernel(kernel).release for kernel in KERNELS]
        digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
        return self._cache.root / f"systemd-root-{digest[:12]}"

    def fetch(self) -> None:
        """Make the root unless the cache has it; older ones are removed.  Raises `CacheError`."""
        with self._cache.lock():
            if self.path.is_dir():
                return
            for stale in self._cache.root.glob("systemd-root-*"):
                shutil.rmtree(stale)
            staging = self.path.with_suffix(".partial")
            print("guest: making the root of the systemd guest, some minutes", flush=True)
            bootstrap(staging)
            for kernel in KERNELS:
                add_modules(staging, self._cache.kernel(kernel).module_root)
            make_machine(staging)
            add_python_packages(staging)
            os.sync()
            staging.rename(self.path)
            print("guest: the root of the systemd guest is ready", flush=True)

    def copy(self, into: Path) -> None:
        """A root for one run, with this checkout installed in it as the README says.  Raises `CacheError`."""
        copy_root(self.path, into)
        install(into)

    def copy_debian(self, into: Path) -> None:
        """A root for one run that has Debian's packages only.  Raises `CacheError`."""
        copy_root(self.path, into)
        for made in ("opt/ublkpool", WHEELS):
            shutil.rmtree(into / made)
        (into / "usr/local/bin/ublkpool").unlink()


def copy_root(root: Path, into: Path) -> None:
    """Copy a root, by reference where the file system can.  Raises `CacheError`."""
    run(["cp", "-a", "--reflink=auto", str(root), str(into)])


def dependencies() -> list[str]:
    """The requirements in pyproject.toml."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    return [str(each) for each in project["dependencies"]]


def bootstrap(root: Path, suite: str = SUITE, packages: Sequence[str] = PACKAGES) -> None:
    """Install Debian's files with debootstrap.  Raises `CacheError`."""
    mirrors = candidate_mirrors(read_sources(), release_codename(OS_RELEASE.read_text()))
    proxies = {f"{scheme}_proxy": proxy for scheme, proxy in apt_proxies().items()}
    problems = []
    for mirror in mirrors:
        shutil.rmtree(root, ignore_errors=True)
        command = [
            "debootstrap",
            "--variant=minbase",
            f"--keyring={KEYRING}",
            f"--include={','.join(packages)}",
        ]
        try:
            privately([*command, suite, str(root), mirror], proxies | dict(os.environ))
            return
        except CacheError as error:
            problems.append(str(error))
    raise CacheError("\n".join(problems) or "apt knows no Debian mirror with component main")


def add_modules(root: Path, module_root: Path) -> None:
    """Copy one kernel's modules, which the cache has indexed."""
    (modules,) = (module_root / "lib/modules").iterdir()
    shutil.copytree(modules, root / "usr/lib/modules" / modules.name, symlinks=True)


def make_machine(root: Path) -> None:
    """Configure the machine: a host name, an empty fstab, a persistent journal."""
    (root / "etc/hostname").write_text("ublkpool-guest\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost ublkpool-guest\n")
    (root / "etc/fstab").write_text("")
    (root / "etc/machine-id").write_text(
        hashlib.md5(b"ublkpool guest", usedforsecurity=False).hexdigest() + "\n"
    )
    (root / "var/log/journal").mkdir(exist_ok=True)
    for unit in MASKED:
        link = root / "etc/systemd/system" / unit
        link.unlink(missing_ok=True)
        link.symlink_to("/dev/null")


def add_python_packages(root: Path) -> None:
    """Make a virtual environment with all requirements, so that installing the project fetches nothing."""
    wheels = root / WHEELS
    wheels.mkdir()
    platforms = [f"--platform={platform}" for platform in PLATFORMS]
    pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "-d", str(wheels)]
    target = [f"--python-version={PYTHON}", "--implementation=cp", "--only-binary=:all:", *platforms]
    run([*pip, *target, *BUILD_PACKAGES, *dependencies()])
    inside(
        root,
        "python3 -m venv /opt/ublkpool",
        f"{offline_pip()} {shlex.join([*BUILD_PACKAGES, *dependencies()])}",
        "ln -s /opt/ublkpool/bin/ublkpool /usr/local/bin/",
    )


def install(root: Path) -> None:
    """Install the checkout as README and OPERATIONS say, but without fetching.  Raises `CacheError`."""
    source = root / "root/ublkpool"
    source.mkdir()
    for name in (*SOURCES, *PARTS):
        copy_source(PROJECT / name, source / name)
    inside(
        root,
        "cd /root/ublkpool",
        f"{offline_pip()} --no-build-isolation --no-deps .",
        "install -D -m 644 config/ublkpool.toml /etc/ublkpool/ublkpool.toml",
        "install -m 644 config/*.service /etc/systemd/system/",
        "install -m 644 config/99-ublkpool.rules /etc/udev/rules.d/",
        f"install -D -m 644 config/ublkpool-hardening.conf {DROP_INS}/hardening.conf",
        "groupadd --system ublkpool",
        "useradd --system --no-create-home ublkpool-worker",
    )


def copy_source(source: Path, target: Path) -> None:
    """Copy a file, or a folder without build results."""
    if source.is_dir():
        built = shutil.ignore_patterns("__pycache__", "*.so", "*.o", "_*_native.c", "*.egg-info")
        shutil.copytree(source, target, symlinks=True, ignore=built)
    else:
        shutil.copy(source, target)


def offline_pip() -> str:
    """The command that installs from the wheels in the root."""
    return f"/opt/ublkpool/bin/pip install -q --disable-pip-version-check --no-index --find-links=/{WHEELS}"


def inside(root: Path, *lines: str) -> None:
    """Run shell lines in the root, with /proc and /dev mounted.  Raises `CacheError` if one fails."""
    chroot = shlex.join(["chroot", str(root), "/bin/bash", "-euc", "\n".join(lines)])
    mounts = [
        f"mount -t proc proc {shlex.quote(str(root / 'proc'))}",
        f"mount --rbind /dev {shlex.quote(str(root / 'dev'))}",
    ]
    environ = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
    privately(["bash", "-euc", "\n".join([*mounts, f"exec {chroot}"])], environ)


def privately(command: Sequence[str], environ: dict[str, str]) -> None:
    """Run a command in a mount namespace of its own.  Raises `CacheError`."""
    run(["unshare", "--mount", "--propagation", "private", *command], environ)


def run(command: Sequence[str], environ: dict[str, str] | None = None) -> None:
    """Run a command without showing its output.  Raises `CacheError` with the output if it fails."""
    with suppress(FileNotFoundError):
        done = subprocess.run(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode == 0:
            return
        said = "\n".join(done.stdout.splitlines()[-30:])
        raise CacheError(f"{shlex.join(command)[:200]} ended with status {done.returncode}:\n{said}")
    raise CacheError(f"{command[0]} is missing: run `make host`")
