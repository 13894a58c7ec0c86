"""The Debian package through its life in a clean Debian: installed, upgraded, removed and purged, in a chroot.

Needs root, for the chroot.  `make deb` has built the package.
"""

import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from support.guest.cache import CacheError, GuestCache
from support.listing import NOT_FILES, Listing, listing
from support.systemd.root import SUITE, SystemdRoot, bootstrap, copy_root, inside

DIST = Path(__file__).parents[2] / "dist"
EARLIER = "0.0.9"
OTHER_PACKAGES = ("systemd", "systemd-sysv", "udev", "kmod", "python3")
"""What a root of a suite that no guest boots has besides its smallest set."""
NOT_OURS = (*NOT_FILES, "dev")
"""Besides what is on no disk the host's devices, which the chroot shows."""
CONFIG = "etc/ublkpool/ublkpool.toml"
RECORD = "run/ublkpool/devices/vol0.json"
STATE = ("vol0.json", "lock", "events.jsonl", ".room-0", "at/run/other/vol1.json", "at/run/other/lock")
"""Files that daemons write into the state directory."""
STORES = ("vol0.img", "vol0/index.json")
"""Files of disks' data that an operator has put there."""
BY_HAND = ("etc/systemd/system/ublkpool.service", "usr/local/bin/ublkpool")
"""Files of an installation by hand."""


def package_file(directory: Path = DIST) -> Path:
    """The package that `make deb` has built.  Raises `CacheError` if there is none, or more than one."""
    found = sorted(directory.glob("ublkpool_*.deb"))
    if len(found) != 1:
        raise CacheError(f"{directory} has {len(found)} packages of ublkpool: run `make deb`")
    return found[0]


def older(package: Path, scratch: Path) -> Path:
    """A package like this one, of version EARLIER, in the folder `scratch`.

    Its files have other times, by which a daemon tells the code of its workers from its own.
    """
    tree = scratch / "older"
    run(["dpkg-deb", "-R", str(package), str(tree)])
    control = tree / "DEBIAN/control"
    lines = control.read_text().splitlines()
    control.write_text(
        "".join(f"Version: {EARLIER}\n" if each.startswith("Version:") else f"{each}\n" for each in lines)
    )
    run(["find", str(tree / "usr"), "-name", "*.py", "-exec", "touch", "-d", "2026-01-01", "{}", "+"])
    made = scratch / f"ublkpool_{EARLIER}.deb"
    run(["dpkg-deb", "--root-owner-group", "-Znone", "-b", str(tree), str(made)])
    shutil.rmtree(tree)
    return made


def run(command: list[str]) -> None:
    """Run a command.  Raises `CacheError` with its output if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise CacheError(f"{shlex.join(command)} failed:\n{done.stdout}")


def debian_root(suite: str, into: Path) -> None:
    """A root of the suite with Debian's packages only, of the cache if that has one.  Raises `CacheError`."""
    cache = GuestCache()
    if suite == SUITE:
        made = SystemdRoot(cache)
        made.fetch()
        made.copy_debian(into)
        return
    kept = cache.root / f"debian-{suite}"
    with cache.lock():
        if not kept.is_dir():
            staging = kept.with_suffix(".partial")
            bootstrap(staging, suite, OTHER_PACKAGES)
            os.sync()
            staging.rename(kept)
    copy_root(kept, into)


def install(root: Path, package: Path) -> str:
    """Install the package as its user does; returns what dpkg says.  Raises `CacheError`."""
    shutil.copy(package, root / "root/package.deb")
    return said_in(root, "dpkg -i /root/package.deb")


def said_in(root: Path, command: str) -> str:
    """What a command says in the root.  Raises `CacheError` if it fails."""
    inside(root, f"{{ {command} ; }} > /root/said 2>&1 || {{ cat /root/said; exit 1; }}")
    return (root / "root/said").read_text()


def refused_in(root: Path, command: str) -> str:
    """What a command says that fails.  Raises `CacheError` if it does not."""
    inside(root, f"! {{ {command} ; }} > /root/said 2>&1")
    return (root / "root/said").read_text()


@dataclass
class Life:
    """What was seen at each step of a package's life in one root."""

    said: dict[str, str] = field(default_factory=dict)
    """What each command said, by the name of its step."""
    config: dict[str, str] = field(default_factory=dict)
    """The operator's config after each of these steps."""
    files: dict[str, Listing] = field(default_factory=dict)
    """All files of the root, before the package came and after these steps."""


PROBES = {
    "python": "/usr/lib/ublkpool/bin/python -c 'import ublkpool; print(ublkpool.__version__)'",
    "version": "ublkpool --version",
    "doctor": "ublkpool doctor --json || [ $? = 1 ]",
    # A backend's process, its rings, its ZeroMQ and its memory.
    "check": "ublkpool backend check memory size=16M --seconds 0.2",
    "group": "getent group ublkpool",
    "user": "getent passwd ublkpool-worker",
    "commands": "grep -h '^Exec.*ublkpool' /usr/lib/systemd/system/ublkpool*.service",
    "units": "systemd-analyze verify --man=no /usr/lib/systemd/system/ublkpool.service",
}
"""Commands that run with the package installed."""


def live(root: Path, package: Path, scratch: Path) -> Life:
    """Take a clean root through all steps.  Raises `CacheError` if a step fails that must not."""
    seen = Life()
    seen.files["clean"] = listing(str(root), NOT_OURS)
    _install_older(root, older(package, scratch), seen)
    install(root, package)
    seen.config["upgrade"] = (root / CONFIG).read_text()
    seen.files["installed"] = listing(str(root), NOT_OURS)
    for name, command in PROBES.items():
        seen.said[name] = said_in(root, command)
    _remove(root, seen)
    _purge(root, seen)
    seen.files["purged"] = listing(str(root), NOT_OURS)
    return seen


def _install_older(root: Path, package: Path, seen: Life) -> None:
    """Install an earlier version beside what is there by hand; then the operator writes the config."""
    for each in BY_HAND:
        (root / each).write_text("[Service]\nExecStart=true\n")
    seen.said["by hand"] = install(root, package)
    for each in BY_HAND:
        (root / each).unlink()
    config = root / CONFIG
    config.write_text(config.read_text() + "\n# mine\n")
    seen.config["mine"] = config.read_text()
    said_in(root, "systemctl --quiet enable ublkpool ublkpool-backend@vol0")


def _remove(root: Path, seen: Life) -> None:
    """Try to remove the package while devices are served without a daemon, then remove it."""
    record = root / RECORD
    record.parent.mkdir(parents=True)
    record.write_text("{}")
    seen.said["remove without daemon"] = refused_in(root, "dpkg -r ublkpool")
    seen.said["version after refusal"] = said_in(root, "ublkpool --version")
    record.unlink()
    for name in (*STATE, *STORES):
        file = root / "var/lib/ublkpool" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("" if file.name == "lock" else "{}")
    said_in(root, "dpkg -r ublkpool")
    seen.config["remove"] = (root / CONFIG).read_text()
    seen.files["removed"] = listing(str(root), NOT_OURS)


def _purge(root: Path, seen: Life) -> None:
    """Purge the package, first beside a unit that was installed by hand; the operator's stores stay."""
    by_hand = root / BY_HAND[0]
    by_hand.write_text("")
    seen.said["purge by hand"] = said_in(root, "/var/lib/dpkg/info/ublkpool.postrm purge")
    by_hand.unlink()
    seen.files["purged by hand"] = listing(str(root), NOT_OURS)
    seen.said["purge"] = said_in(root, "dpkg -P ublkpool")
    state = root / "var/lib/ublkpool"
    seen.said["kept"] = " ".join(
        sorted(str(each.relative_to(state)) for each in state.rglob("*") if each.is_file())
    )
    shutil.rmtree(state)
