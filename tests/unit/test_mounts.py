"""Which mounts a starting daemon takes for its own disks', from a made-up /proc and /sys."""

from pathlib import Path

import pytest

from ublkpool.daemon import mounts

MOUNTINFO = r"""
21 1 8:1 / / rw - ext4 /dev/sda1 rw
22 21 259:0 / /mnt/whole\040disk rw,relatime shared:3 master:1 - ext4 /dev/ublkb0 rw
23 21 259:1 / /mnt/part rw - ext4 /dev/ublkb0p1 rw
24 21 253:0 / /mnt/lvm rw - xfs /dev/mapper/vg-a rw
25 21 0:44 / /mnt/btrfs rw - btrfs /dev/ublkb0 rw
26 21 259:9 / /mnt/foreign rw - ext4 /dev/ublkb7 rw
27 21 0:22 / /proc rw - proc proc rw
""".strip()


@pytest.fixture
def left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The mount points that were left."""
    block = tmp_path / "dev" / "block"
    block.mkdir(parents=True)
    disks = {
        "8:1": "sda/sda1",
        "259:0": "ublkb0",
        "259:1": "ublkb0/ublkb0p1",
        "253:0": "dm-0",
        "259:9": "ublkb7",
    }
    for number, name in disks.items():
        (tmp_path / "devices" / name).mkdir(parents=True, exist_ok=True)
        (block / number).symlink_to(tmp_path / "devices" / name)
    slaves = tmp_path / "devices" / "dm-0" / "slaves"
    slaves.mkdir()
    (slaves / "ublkb0p1").symlink_to(tmp_path / "devices" / "ublkb0" / "ublkb0p1")
    found: list[str] = []
    monkeypatch.setattr(mounts, "_SYS_BLOCK", block)
    monkeypatch.setattr(Path, "read_text", lambda path: MOUNTINFO)
    monkeypatch.setattr("ublkpool.ublk.queue.leave_mount", found.append)
    return found


def test_what_lies_on_our_own_disks_is_left_and_nothing_else(left: list[str]) -> None:
    mounts.leave_mounts([0, 5])
    assert left == ["/mnt/btrfs", "/mnt/lvm", "/mnt/part", "/mnt/whole disk"]


def test_without_disks_nothing_is_left(left: list[str]) -> None:
    mounts.leave_mounts([])
    assert left == []
