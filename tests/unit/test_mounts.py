"""Which mounts a daemon detaches from its own namespace: on made-up tables, and for real where a test may unshare."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.loop_devices import alone_with_loop_devices
from ublkpool.bufpool.mountinfo import parse_mounts
from ublkpool.daemon.processes import mounts
from ublkpool.daemon.processes.mounts import idle_mounts

MOUNTINFO = r"""
21 1 8:1 / / rw - ext4 /dev/sda1 rw
22 21 259:0 / /mnt/whole\040disk rw,relatime shared:3 master:1 - ext4 /dev/ublkb0 rw
23 22 0:44 / /mnt/whole\040disk/below rw - tmpfs tmpfs rw
24 21 0:22 / /proc rw - proc proc rw
25 21 0:23 / /dev rw - devtmpfs devtmpfs rw
26 25 0:24 / /dev/shm rw - tmpfs tmpfs rw
27 25 8:2 / /dev/disk rw - ext4 /dev/sda2 rw
28 21 0:25 / /run rw - tmpfs tmpfs rw
29 28 0:26 / /run/user/7 rw - tmpfs tmpfs rw
30 21 8:3 / /home rw - ext4 /dev/sda3 rw
31 30 8:4 / /home/us rw - ext4 /dev/sda4 rw
32 30 8:5 / /home/them rw - ext4 /dev/sda5 rw
33 21 8:6 / /srv rw - ext4 /dev/sda6 rw
34 33 8:7 / /srv rw - ext4 /dev/sda7 rw
""".strip()
RUN, HOME_US = 28, 31


def test_used_mounts_stay_with_their_parents_and_so_do_the_kernels_own_trees() -> None:
    idle = idle_mounts(list(parse_mounts(MOUNTINFO)), {RUN, HOME_US})
    assert [each.path for each in idle] == [
        "/mnt/whole disk",
        "/dev/disk",
        "/run/user/7",
        "/home/them",
        "/srv",
    ]
    assert idle[-1].id == 34, "of two at one path the one that can be reached goes first"


def test_a_mount_on_an_idle_mount_is_detached_with_it() -> None:
    table = list(parse_mounts(MOUNTINFO))
    assert [each.id for each in idle_mounts(table, {23})] == [27, 28, 30, 34]


def test_the_root_is_never_idle() -> None:
    assert [each.id for each in idle_mounts(list(parse_mounts(MOUNTINFO)), set())] == [22, 27, 28, 30, 34]


def test_a_path_that_does_not_exist_counts_as_its_nearest_parent(tmp_path: Path) -> None:
    assert mounts.mounts_on_the_way([tmp_path / "not" / "yet"]) == mounts.mounts_on_the_way([tmp_path])
    assert mounts.mounts_on_the_way([Path("/proc/self")]) > mounts.mounts_on_the_way([Path("/")])


def test_a_symbolic_link_leads_over_the_mounts_of_both_ends(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("/proc")
    both = mounts.mounts_on_the_way([tmp_path]) | mounts.mounts_on_the_way([Path("/proc")])
    assert mounts.mounts_on_the_way([link]) == both


def test_code_paths_are_those_of_modules_and_sys_path_without_the_operators_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stood, more = tmp_path / "stood", tmp_path / "more"
    monkeypatch.setattr(sys, "path", [str(stood), str(more)])
    found = mounts.own_paths()
    assert more in found and stood not in found
    assert Path(mounts.__file__).parent in found and Path(os.__file__).parent in found


_DAEMON = """
import os, subprocess, sys
from pathlib import Path
from ublkpool.bufpool.mountinfo import read_mounts
from ublkpool.daemon.processes import mounts
from ublkpool.daemon.backends.backend_process import BackendProcess

def mount(where, *options):
    Path(where).mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", *options, "-t", "tmpfs", "t", where], check=True)

root, propagation = sys.argv[1:]
subprocess.run(["mount", f"--make-r{propagation}", "/"], check=True)
odd = os.fsdecode(b"odd\\xff\\r\\x0c\\xc2\\xa0name")
for name in ("early", "early/below", "run", "late/hidden", "late", odd):
    mount(f"{root}/{name}")
os.chdir(f"{root}/early")
live = mounts.leave_for_own_view([Path(f"{root}/run/ublkpool")])
ours = {each.path for each in read_mounts() if each.path.startswith(root)}
assert ours == {f"{root}/run"}, ours
assert os.getcwd() == "/"
assert os.path.exists(sys.executable) and os.path.exists("/dev/shm") and os.path.exists("/proc/self/fd")
if os.fork() == 0:
    mounts.enter_live_view(live, f"{root}/early/below")
    assert os.getcwd() == f"{root}/early/below"
    subprocess.run(["umount", f"{root}/late"], check=True)
    mount(f"{root}/new")
    Path(f"{root}/new/file").touch()
    os._exit(0)
assert os.wait()[1] == 0
# Nothing that is mounted there later comes here.
assert not Path(f"{root}/new/file").exists()
if os.fork() == 0:
    mounts.enter_live_view(live, f"{root}/new")
    assert Path("file").exists() and Path(f"{root}/late/hidden").exists()
    os._exit(0)
assert os.wait()[1] == 0
if os.fork() == 0:
    mounts.enter_live_view(live, f"{root}/nowhere")
assert os.wait()[1] == 1 << 8
"""


@pytest.mark.parametrize("propagation", ["private", "shared"])
def test_a_process_in_its_own_namespace_pins_no_unused_mount_and_its_children_can_return(
    tmp_path: Path, propagation: str
) -> None:
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("may not make mount namespaces; the vm tests do")
    command = ["unshare", "-m", sys.executable, "-c", _DAEMON, str(tmp_path), propagation]
    with alone_with_loop_devices():
        ran = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
    assert ran.returncode == 0, ran.stderr
    assert (
        ran.stderr == f"ublkpool: cannot start in directory {tmp_path}/nowhere: No such file or directory\n"
    )
