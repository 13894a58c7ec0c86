"""Two mount namespaces: the operator's, in which backends run, and the daemon's own, which pins almost no mount.

A process pins every mount of its mount namespace.  The daemon's processes live longer than other programs' mounts; if
they pinned a mount of the daemon's own disk, the kernel would release it at their end and wait there for a disk that
has no server.  So the daemon leaves the namespace that it was started in, makes its copy private, and detaches from
that copy every mount that holds nothing the daemon itself uses.  Workers, broker, holder and control commands are
forked later and share this namespace.

Backends have no `/dev/ublkcN` open, and the files that they serve are the operator's.  They run in the namespace that
the daemon was started in: the daemon keeps a descriptor of it, and the forked child, a backend or the backends'
template, enters it before exec.  Each daemon keeps its own, so after a takeover backends are started in the new
daemon's namespace.  The process that reads the config again enters it, too.
"""

import logging
import os
import shutil
import sys
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import ublkpool
from ublkpool.bufpool.mountinfo import Mount, read_mounts, shown
from ublkpool.ublk import process_calls

NAMESPACE = Path("/proc/self/ns/mnt")
KERNEL_TREES = ("/proc", "/sys", "/dev")
"""Mounts below these that have no block device (devpts, /dev/shm, cgroups, a single device node) stay, too."""
SYSTEM_PATHS = ("/", *KERNEL_TREES, "/dev/shm", "/sys/fs/cgroup", "/etc", "/run", "/run/udev")
"""The paths that the daemon opens under fixed names."""
_log = logging.getLogger("ublkpool.supervisor")


def leave_for_own_view(used: Iterable[Path]) -> int:
    """Move this process into a mount namespace of its own, with the mounts that the daemon needs and those of `used`.

    For a path of `used` that does not exist yet, its nearest existing parent counts.  Returns a descriptor of the
    namespace that was left, close-on-exec.  Raises `OSError`.
    """
    live = os.open(NAMESPACE, os.O_RDONLY | os.O_CLOEXEC)
    try:
        process_calls.private_mounts()
    except OSError:
        os.close(live)
        raise
    # The operator's working directory would pin its mount.
    os.chdir("/")
    detach_all_but([*used, *own_paths()])
    return live


def detach_all_but(used: Iterable[Path]) -> None:
    """Detach, in this namespace, every mount but those that these paths cross.  A failure is logged."""
    ids = mounts_on_the_way(used)
    while idle := idle_mounts(read_mounts(), ids):
        # In reverse order of mounting: a later mount may hide an earlier one.
        refusals = [_detach(each) for each in reversed(idle)]
        if all(refusals):
            for mount, refusal in zip(reversed(idle), refusals, strict=True):
                _log.warning("the daemon keeps the mount %s pinned: %s", shown(mount.path), refusal)
            return


def _detach(mount: Mount) -> str | None:
    """The reason of a failure, or None."""
    try:
        process_calls.leave_mount(mount.path)
    except OSError as error:
        return error.strerror or str(error)
    return None


def idle_mounts(mounts: Sequence[Mount], used: Collection[int]) -> list[Mount]:
    """The mounts to detach next, given the ids of those in use: each is mounted directly on one that stays.

    Mounts on a detached mount go with it.  Of several mounts at one path only the last can be reached.
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
    """The ids of the mounts that a look-up of these paths crosses, as far as the paths exist."""
    return {found for each in _crossed(map(str, paths)) if (found := _mount_of(each)) is not None}


def _crossed(paths: Iterable[str]) -> set[str]:
    """The paths and all their parents, each once: they have most of them in common."""
    crossed: set[str] = set()
    for path in paths:
        while path not in crossed:
            crossed.add(path)
            path = _parent(path)
    return crossed


def _parent(path: str) -> str:
    # A daemon looks at hundreds of paths at its start, and pathlib took half of its time.
    return path.rpartition("/")[0] or "/"


def _mount_of(path: str) -> int | None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        with open(f"/proc/self/fdinfo/{fd}") as file:  # noqa: PTH123
            about = file.read()
    finally:
        os.close(fd)
    return next(int(line.split()[1]) for line in about.splitlines() if line.startswith("mnt_id:"))


def own_paths() -> set[Path]:
    """The paths of the system, of this process's code, and of modules and programs that it may need later."""
    paths = {*SYSTEM_PATHS, *_code(), *_libraries()}
    if (tool := shutil.which("udevadm")) is not None:
        paths.add(tool)
    if (address := os.environ.get("NOTIFY_SOCKET", "")).startswith("/"):
        paths.add(address)
    # A symbolic link needs the mount that it is on, and the mount of its target.
    return {Path(each) for path in paths for each in (path, _target(path))}


def _target(path: str) -> str:
    """Where the path leads over symbolic links; itself if it does not exist."""
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return path
    try:
        return os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115
    finally:
        os.close(fd)


def _code() -> set[str]:
    """The directories of loaded modules, and those from which modules may be loaded later."""
    files = [getattr(module, "__file__", None) for module in tuple(sys.modules.values())]
    # The first entry of sys.path may be the operator's working directory (python -m).
    return {*ublkpool.__path__, *sys.path[1:], *map(_parent, filter(None, (sys.executable, *files)))}


def _libraries() -> set[str]:
    lines = os.fsdecode(Path("/proc/self/maps").read_bytes()).split("\n")
    files = {fields[5] for each in lines if len(fields := each.split(maxsplit=5)) == 6}
    return {_parent(each) for each in files if each.startswith("/")}


def enter_live_view(live: int, cwd: str) -> None:
    """In a forked child, before its exec as a backend: enter the namespace `live`, and the directory `cwd` there.

    If that fails, the child ends with a line on its stderr.
    """
    try:
        process_calls.enter_mounts(live)
        os.chdir(cwd)
    except OSError as error:
        with suppress(OSError):
            os.write(2, f"ublkpool: cannot start in directory {cwd}: {error.strerror}\n".encode())
        os._exit(1)
