"""The names of disks for udev: a file for each disk, which the rules in `config/99-ublkpool.rules` import.

Owns the files `/run/ublkpool-names/SEQUENCE`, those of all daemons of this machine.  SEQUENCE is the number that the
kernel gives to a disk (`diskseq`) and to no other disk until the next boot.  So a file that a killed daemon left names
no other disk, whichever program gets the device number next; and no process has to run for an event of udev's.  The
kernel chooses that number in START_DEV: the file is written after it, and a change event has udev read it.

`publish` and `withdraw` run in a disposable process.
"""

import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ublkpool.ublk.privilege import is_in_user_namespace

LINK_PATIENCE_S = 3.0
"""How long udev may take to remove the links to a disk that is gone."""
_KEY = "UBLKPOOL_NAME="
_LIKE_A_PARTITION = re.compile(r"-part\d+\Z")
_LINKS = (("ublkpool", ""), ("disk/by-id", "ublkpool-"))
"""Directories in /dev, and what comes before the name there."""
_MODE = 0o700
"""For root alone, as which udev reads: a user who can open the directory can lock it for ever (flock(2))."""
_ATTEMPTS = 16
_POLL_S = 0.02


class DiskNames:
    """The names on one machine, whose file tree begins at `root`."""

    def __init__(self, root: Path = Path("/")) -> None:
        """Nothing is opened yet."""
        self._directory = root / "run/ublkpool-names"
        self._udev = root / "run/udev/control"
        self._disks = root / "sys/class/block"
        self._dev = root / "dev"

    @property
    def are_wanted(self) -> bool:
        """Whether udev runs here, or left names behind, and this process may tell it any.  Does not wait for a disk."""
        if os.geteuid() != 0 or is_in_user_namespace():
            return False
        return self._udev.exists() or self._directory.is_dir()

    def publish(self, name: str, disk: str, check: Callable[[], None]) -> str:
        """Give the disk this name, and have udev link it unless it has; why that cannot be, or nothing.

        `check` raises `UblkError` if the device number is another server's.  Raises `OSError`.
        """
        if _LIKE_A_PARTITION.search(name):
            return "its name ends like that of a partition: a link could lead to another device's"
        # The same device before and after: what was read between is of its disk.
        check()
        sequence = self._sequence(disk)
        check()
        # All devices of a takeover come at once, most of them with name and link: these need not wait for the lock.
        if not sequence or (
            self._is_right(sequence, name) and self._is_closed() and self.linked(name) == disk
        ):
            return ""
        with self._locked():
            found = self._sweep()
            other = _named(self._texts(), found).get(name, disk)
            if other != disk:
                return f"{other}, perhaps of another daemon, has this name: give one of the two devices another name"
            is_new = self._write(sequence, name)
            if self._sequence(disk) != sequence:
                # The disk went, and `withdraw` may have looked already.
                self._sweep()
                return ""
        if is_new or self.linked(name) != disk:
            self._announce(disk)
        return ""

    def withdraw(self, name: str, disk: str) -> bool:
        """Forget the name of a disk that is gone, and return when no link leads to it; false if the disk is there.

        A link that udev has not removed after `LINK_PATIENCE_S` is removed here: the disk's number is free soon, and
        the link would lead to the next disk.  Raises `OSError`.
        """
        if self._directory.is_dir():
            with self._locked():
                self._sweep()
                with suppress(OSError):
                    self._directory.rmdir()
        if (self._disks / disk).exists():
            return False
        until_s = time.monotonic() + LINK_PATIENCE_S
        while self._links(name, disk) and time.monotonic() < until_s:
            time.sleep(_POLL_S)
        for link in self._links(name, disk):
            link.unlink(missing_ok=True)
        return True

    def published(self) -> dict[str, str]:
        """The disks that exist, such as `ublkb0`, by their published names."""
        texts = self._texts()
        return _named(texts, self._sequences())

    def linked(self, name: str) -> str:
        """The disk or partition to which the link of this name in /dev leads, such as `ublkb0`; empty if none does."""
        with suppress(OSError):
            return (self._dev / "ublkpool" / name).readlink().name
        return ""

    def _sequence(self, disk: str) -> str:
        """The kernel's number for this very disk; empty if it is gone."""
        return _text(self._disks / disk / "diskseq").strip()

    def _sequences(self) -> dict[str, str]:
        """The ublk disks that exist, by their sequence numbers."""
        return {self._sequence(each.name): each.name for each in self._disks.glob("ublkb*")}

    def _files(self) -> list[Path]:
        with suppress(OSError):
            return [each for each in self._directory.iterdir() if each.name.isdecimal()]
        return []

    def _texts(self) -> dict[str, str]:
        """What the files say, by the sequence numbers of their disks."""
        return {each.name: _text(each) for each in self._files()}

    def _is_closed(self) -> bool:
        """Whether the directory is as `_check_owner` makes it."""
        with suppress(OSError):
            about = self._directory.lstat()
            return (about.st_uid, about.st_mode) == (os.geteuid(), stat.S_IFDIR | _MODE)
        return False

    def _is_right(self, sequence: str, name: str) -> bool:
        """Whether the disk's file gives it this name."""
        return _text(self._directory / sequence) == f"{_KEY}{name}\n"

    def _sweep(self) -> dict[str, str]:
        """Remove the files of disks that are gone; the caller has the lock.  Returns what `_sequences` does."""
        # Listed first: each of these disks existed when its file was written.
        files = self._files()
        found = self._sequences()
        for each in files:
            if each.name not in found:
                each.unlink(missing_ok=True)
        (self._directory / ".new").unlink(missing_ok=True)
        return found

    def _write(self, sequence: str, name: str) -> bool:
        """Write the file as a whole; false if it was right."""
        if self._is_right(sequence, name):
            return False
        fresh = self._directory / ".new"
        try:
            fresh.write_text(f"{_KEY}{name}\n")
            fresh.chmod(0o644)
            fresh.replace(self._directory / sequence)
        finally:
            fresh.unlink(missing_ok=True)
        return True

    def _announce(self, disk: str) -> None:
        """Have udev look at the disk again, and at its partitions."""
        (self._disks / disk / "uevent").write_text("change")
        for each in sorted(self._disks.glob(f"{disk}p*")):
            # A partition table that is being read anew takes partitions away.
            with suppress(OSError):
                (each / "uevent").write_text("change")

    def _links(self, name: str, disk: str) -> list[Path]:
        """The links of this name, and of its partitions, that lead to the disk or to a partition of it."""
        link = re.compile(re.escape(name) + r"(-part\d+)?\Z")
        node = re.compile(re.escape(disk) + r"(p\d+)?\Z")
        found = []
        for directory, prefix in _LINKS:
            with suppress(OSError):
                for each in (self._dev / directory).iterdir():
                    is_named = each.name.startswith(prefix) and link.match(each.name.removeprefix(prefix))
                    if is_named and each.is_symlink() and node.match(each.readlink().name):
                        found.append(each)
        return found

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """The directory, made if it is missing, while no other process changes it.  Raises `OSError`."""
        fd = self._lock()
        try:
            yield
        finally:
            os.close(fd)

    def _lock(self) -> int:
        for _ in range(_ATTEMPTS):
            with suppress(FileExistsError):
                self._directory.mkdir(_MODE)
            # Another process may remove it, empty, before it is opened or before it is locked.
            with suppress(FileNotFoundError):
                fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
                with ExitStack() as opened:
                    opened.callback(os.close, fd)
                    _check_owner(fd, self._directory)
                    fcntl.flock(fd, fcntl.LOCK_EX)
                    if os.path.samestat(os.fstat(fd), self._directory.lstat()):
                        opened.pop_all()
                        return fd
        raise OSError(errno.EAGAIN, "other processes remove it again and again", str(self._directory))


def _named(texts: Mapping[str, str], found: Mapping[str, str]) -> dict[str, str]:
    """Of the disks in `found`, by sequence number as `texts` are, those that have a name, by that name."""
    return {
        text.removeprefix(_KEY).strip(): found[sequence]
        for sequence, text in texts.items()
        if sequence in found and text.startswith(_KEY)
    }


def _check_owner(fd: int, path: Path) -> None:
    """Raise `OSError` if another user could write what udev reads as root; no other user opens it from now on."""
    if os.fstat(fd).st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, "it belongs to another user", str(path))
    # An earlier version made it readable for all.
    os.fchmod(fd, _MODE)


def _text(path: Path) -> str:
    with suppress(OSError, UnicodeDecodeError):
        return path.read_text()
    return ""
