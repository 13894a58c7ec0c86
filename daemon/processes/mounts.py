"""Two views of the machine's mounts: the operator's, where backends run, and the daemon's own, which pins almost none.

A process pins every mount of its mount namespace.  The daemon's processes live longer than the mounts of others, and a
mount of the daemon's own disk that they held could never be let go of: at their end the kernel would wait for a disk
that has no server.  So the daemon leaves the namespace that it was started in, makes its copy private, and detaches
from that copy every mount on which nothing lies that the daemon itself uses.  Workers, broker, holder and control
commands are forked later and share this view.

Backends hold no `/dev/ublkcN`, and the files that they serve are the operator's.  They run in the namespace that the
daemon was started in: a descriptor of it is kept, and the forked child enters it before exec.  Each daemon keeps its
own, so after a takeover backends are started in the namespace of the daemon that runs now.
"""

import logging
import os
import re
import shutil
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import ublkpool
from ublkpool.ublk import queue

NAMESPACE = Path("/proc/self/ns/mnt")
KERNEL_TREES = ("/proc", "/sys", "/dev")
"""Below these, mounts without a block device (devpts, /dev/shm, cgroups, a single device node) stay as well."""
SYSTEM_PATHS = ("/", *KERNEL_TREES, "/dev/shm", "/sys/fs/cgroup", "/etc", "/run", "/run/udev")
"""What the daemon opens by a fixed path."""
_ESCAPE = re.compile(r"\\([0-7]{3})")
_log = logging.getLogger("ublkpool.supervisor")


class Mount(NamedTuple):
    """A line of /proc/PID/mountinfo (proc_pid_mountinfo(5))."""

    id: int
    parent: int
    device: str
    """`major:minor`"""
    path: str


def leave_for_own_view(used: Iterable[Path]) -> int:
    """Move this process into a mount namespace of its own, which keeps what the daemon needs and the mounts of `used`.

    A path of `used` need not exist yet: then its nearest parent that does counts.  Returns a descriptor of the
    namespace that was left, close-on-exec.  Raises `OSError`.
    """
    live = os.open(NAMESPACE, os.O_RDONLY | os.O_CLOEXEC)
    try:
        queue.private_mounts()
    except OSError:
        os.close(live)
        raise
    # The directory that the operator stood in is no concern of the daemon's.
    os.chdir("/")
    detach_all_but([*used, *own_paths()])
    return live


def detach_all_but(used: Iterable[Path]) -> None:
    """Detach, in this namespace, every mount but those that these paths lead over.  A refused one is logged."""
    ids = mounts_on_the_way(used)
    while idle := idle_mounts(_mounts(), ids):
        # The last that was mounted first: it may hide another.
        refusals = [_detach(each) for each in reversed(idle)]
        if all(refusals):
            for mount, refusal in zip(reversed(idle), refusals, strict=True):
                _log.warning("the daemon keeps the mount %s pinned: %s", mount.path, refusal)
            return


def _detach(mount: Mount) -> str | None:
    """Why not, or None if it is detached."""
    try:
        queue.leave_mount(mount.path)
    except OSError as error:
        return error.strerror or str(error)
    return None


def parse_mounts(mountinfo: str) -> Iterator[Mount]:
    """The mounts that the text describes, in its order."""
    for line in mountinfo.splitlines():
        number, parent, device, _, path = line.split()[:5]
        yield Mount(int(number), int(parent), device, _ESCAPE.sub(lambda code: chr(int(code[1], 8)), path))


def idle_mounts(mounts: Sequence[Mount], used: Collection[int]) -> list[Mount]:
    """The mounts to detach next, given the ids of those in use: each lies directly on one that stays.

    What lies on a detached mount goes with it.  Of several mounts at one path only the last can be reached.
    """
    by_id = {each.id: each for each in mounts}
    staying: set[int] = set()
    for mount in mounts:
        if mount.id in used or _belongs_to_the_kernel(mount):
            staying |= _with_parents(mount, by_id)
    topmost = {each.path: each.id for each in mounts}
    return [
        each
        for each in mounts
        if each.id not in staying
        and topmost[each.path] == each.id
        and (above := by_id.get(each.parent)) is not None
        and (above.id in staying or above.path == each.path)
    ]


def _with_parents(mount: Mount, by_id: dict[int, Mount]) -> set[int]:
    found = {mount.id}
    while (above := by_id.get(mount.parent)) is not None and above.id not in found:
        found.add(above.id)
        mount = above
    return found


def _belongs_to_the_kernel(mount: Mount) -> bool:
    below = any(mount.path == tree or mount.path.startswith(f"{tree}/") for tree in KERNEL_TREES)
    return below and mount.device.startswith("0:")


def mounts_on_the_way(paths: Iterable[Path]) -> set[int]:
    """The ids of the mounts that a look-up of these paths crosses, as far as they exist."""
    # Each directory once: they have most of their parents in common.
    crossed = {each for path in paths for each in (path, *path.parents)}
    return {found for each in crossed if (found := _mount_of(each)) is not None}


def _mount_of(path: Path) -> int | None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        about = Path(f"/proc/self/fdinfo/{fd}").read_text()
    finally:
        os.close(fd)
    return next(int(line.split()[1]) for line in about.splitlines() if line.startswith("mnt_id:"))


def own_paths() -> set[Path]:
    """The paths of the system, of the code that this process runs, and of what it may load or start later."""
    paths = {Path(each) for each in SYSTEM_PATHS} | _code() | _libraries()
    if (tool := shutil.which("udevadm")) is not None:
        paths.add(Path(tool))
    if (address := os.environ.get("NOTIFY_SOCKET", "")).startswith("/"):
        paths.add(Path(address))
    # A symbolic link leads over the mounts of both of its ends.
    return paths | {each.resolve() for each in paths}


def _code() -> set[Path]:
    """Where the loaded modules lie, and where those that are loaded later may."""
    files = [getattr(module, "__file__", None) for module in tuple(sys.modules.values())]
    # The first entry of sys.path may be the directory in which the operator stood (python -m).
    places = {Path(each) for each in (*ublkpool.__path__, *sys.path[1:])}
    return places | {Path(each).parent for each in (sys.executable, *filter(None, files))}


def _libraries() -> set[Path]:
    found: set[Path] = set()
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith("/"):
            found.add(Path(fields[5]).parent)
    return found


def _mounts() -> list[Mount]:
    return list(parse_mounts(Path("/proc/self/mountinfo").read_text()))


def enter_live_view(live: int, cwd: str) -> None:
    """For a forked child, before it execs a backend: enter the namespace `live`, and `cwd` there.

    The child ends with a line on its stderr if that cannot be.
    """
    try:
        queue.enter_mounts(live)
        os.chdir(cwd)
    except OSError as error:
        with suppress(OSError):
            os.write(2, f"ublkpool: cannot start in directory {cwd}: {error.strerror}\n".encode())
        os._exit(1)
