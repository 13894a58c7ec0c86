"""Which changes of a file or a disk change its identity, on the file systems of this machine."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from support.loop_devices import alone_with_loop_devices, loop_device
from ublkpool.bufpool import wire
from ublkpool.bufpool.engine.file_facts import file_birth_ns
from ublkpool.bufpool.sdk import store_identity
from ublkpool.bufpool.sdk.client import OwnSegment
from ublkpool.bufpool.sdk.store_identity import identify, memory_identity
from ublkpool.bufpool.wire import Identity
from ublkpool.bufpool.wire.same_store import is_same_store
from ublkpool.daemon.backends.attach import check_attach

SIZE = 1 << 20
EXT4_UUID = "12345678-1234-1234-1234-123456789abc"


def identity_of(path: Path) -> Identity:
    fd = os.open(path, os.O_RDONLY)
    try:
        return identify(fd, path)
    finally:
        os.close(fd)


def key(path: Path) -> tuple[str, str]:
    found = identity_of(path)
    return found.value, found.in_boot


def make(path: Path) -> Path:
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


def born(path: Path) -> int:
    with path.open() as file:
        return file_birth_ns(file.fileno())


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


class Ext4:
    """A file system of a known UUID on a loop device, mounted or not."""

    def __init__(self, directory: Path) -> None:
        self.image, self.path = directory / "ext4.img", directory / "mnt"
        with self.image.open("wb") as file:
            file.truncate(16 << 20)
        # With a journal, without which ext4 lets the number of a removed file rest for some seconds.
        run("mkfs.ext4", "-q", "-U", EXT4_UUID, str(self.image))
        self.path.mkdir()
        self.mount()

    def mount(self, options: str = "loop") -> None:
        run("mount", "-o", options, str(self.image), str(self.path))

    def unmount(self) -> None:
        run("umount", str(self.path))


@pytest.fixture
def ext4(tmp_path: Path) -> Iterator[Ext4]:
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        pytest.skip("needs root and mkfs.ext4")
    with alone_with_loop_devices():
        try:
            made = Ext4(tmp_path)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no loop mounts here: {error.stderr}")
        yield made
        made.unmount()


@pytest.fixture(params=["tmpfs", "ext4", "here"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param == "tmpfs":
        path = Path("/dev/shm") / f"ublkpool-test-{os.getpid()}"
        path.mkdir()
        yield path
        shutil.rmtree(path)
    else:
        yield request.getfixturevalue("ext4").path if request.param == "ext4" else tmp_path


def test_changes_that_keep_a_files_data_keep_its_identity(place: Path) -> None:
    path = make(place / "a.img")
    first = key(path)
    path.write_bytes(bytes(4096))
    os.truncate(path, 2 * SIZE)
    path.chmod(0o640)
    os.utime(path, (1, 1))
    assert key(path) == first
    path = path.rename(place / "b.img")
    os.link(path, place / "c.img")
    (place / "d.img").symlink_to("c.img")
    assert key(path) == key(place / "c.img") == key(place / "d.img") == first


def test_another_file_in_its_place_has_another_identity(place: Path) -> None:
    path = make(place / "a.img")
    seen = {key(path)}
    shutil.copy(path, place / "copy.img")
    seen.add(key((place / "copy.img").rename(path)))
    for _ in range(20):
        path.unlink()
        seen.add(key(make(path)))
    assert len(seen) == 22


def test_a_file_that_is_given_the_inode_of_a_removed_one_has_another_identity(ext4: Ext4) -> None:
    path = make(ext4.path / "a.img")
    inode, seen = path.stat().st_ino, key(path)
    path.unlink()
    make(path)
    assert path.stat().st_ino == inode, "ext4 gives the number out again"
    assert key(path) != seen


def test_a_remount_changes_nothing_and_the_file_system_s_uuid_counts(ext4: Ext4) -> None:
    path = make(ext4.path / "a.img")
    found = identity_of(path)
    run("mount", "-o", "remount,ro", str(ext4.path))
    assert identity_of(path) == found
    ext4.unmount()
    ext4.mount()
    assert identity_of(path) == found
    assert found.in_boot == ""
    if EXT4_UUID.replace("-", "") in found.value:
        assert found.strength == "strong"
    else:
        assert found.strength == "weak", "a kernel that does not tell the UUID"


def test_a_file_in_memory_ends_with_the_boot() -> None:
    path = make(Path("/dev/shm") / f"ublkpool-test-{os.getpid()}.img")
    try:
        found = identity_of(path)
    finally:
        path.unlink()
    assert (found.value, found.strength) == ("", "strong") and found.in_boot


def test_without_handles_the_identity_is_weak_and_the_date_of_birth_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_identity, "file_handle", lambda _file: "")
    path = make(tmp_path / "a.img")
    first, born_ns = identity_of(path), born(path)
    assert first.strength == "weak" and first.value and born_ns
    # Dates of birth have the steps of the kernel's clock.
    while born(path) == born_ns:
        path.unlink()
        make(path)
    assert identity_of(path).value != first.value


def test_a_handle_that_is_given_out_anew_at_each_look_up_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_identity, "file_system_magic", lambda _file: 0x65735546)
    monkeypatch.setattr(store_identity, "file_handle", lambda _file: pytest.fail("a FUSE handle"))
    assert identity_of(make(tmp_path / "a.img")).strength == "weak"


def test_a_store_is_described_by_path_inode_and_date(tmp_path: Path) -> None:
    path = make(tmp_path / "a.img")
    assert f"a.img (inode {path.stat().st_ino}" in identity_of(path).store
    deep = tmp_path / ("x" * 200)
    assert len(identity_of(make(deep)).store) < 130


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"tab\there", "tab\\there"),
        (b"space\xc2\xa0here", "space\\xa0here"),
        (b"zero\xe2\x80\x8bwidth", "zero\\u200bwidth"),
        (b"latin-\xe9", "latin-\\xe9"),
    ],
)
def test_a_path_that_cannot_be_printed_is_described_with_escapes_and_attaches(
    tmp_path: Path, name: bytes, shown: str
) -> None:
    identity = identity_of(make(tmp_path / os.fsdecode(name)))
    assert f"{shown} (inode" in identity.store
    attach = wire.Attach(v=1, device="vol0", kind="file", identity=identity)
    check_attach(msgspec.json.decode(msgspec.json.encode(attach), type=wire.Attach), None)


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[str]:
    with loop_device(make(tmp_path / "first.img")) as device:
        yield str(device)


def test_a_loop_device_is_the_file_behind_it(loop: str, tmp_path: Path) -> None:
    first = identity_of(Path(loop)).value
    run("losetup", "-d", loop)
    run("losetup", loop, str(tmp_path / "first.img"))
    assert identity_of(Path(loop)).value == first
    run("losetup", "-d", loop)
    run("losetup", loop, str(make(tmp_path / "second.img")))
    second = identity_of(Path(loop)).value
    run("losetup", "-d", loop)
    run("losetup", "-o", "4096", loop, str(tmp_path / "first.img"))
    assert len({first, second, identity_of(Path(loop)).value}) == 3
    other = run("losetup", "-f", "--show", str(tmp_path / "second.img"))
    try:
        assert identity_of(Path(other)).value == second
    finally:
        run("losetup", "-d", other)


def test_a_loop_device_is_the_same_after_its_file_was_unlinked_and_after_it_was_set_up_again(
    loop: str, tmp_path: Path
) -> None:
    named = identity_of(Path(loop))
    run("losetup", "-d", loop)
    run("losetup", loop, str(tmp_path / "first.img"))
    again = identity_of(Path(loop))
    (tmp_path / "first.img").unlink()
    unnamed = identity_of(Path(loop))
    assert is_same_store(named, again, is_same_boot=True)
    assert is_same_store(again, unnamed, is_same_boot=True)
    assert not is_same_store(named, unnamed, is_same_boot=True)
    assert not is_same_store(again, unnamed, is_same_boot=False)


def test_the_identity_of_a_loop_device_on_an_unreadable_file_is_weak(loop: str, tmp_path: Path) -> None:
    (tmp_path / "first.img").unlink()
    found = identity_of(Path(loop))
    assert found.strength == "weak" and found.value and found.in_boot


class Sysfs:
    """Block devices as sysfs shows them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def disk(self, place: str, **files: str) -> Path:
        for name, text in files.items():
            file = self.directory / place / name.replace("__", "/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{text}\n")
        return self.directory / place


@pytest.mark.parametrize(
    ("files", "value"),
    [
        ({"wwid": "eui.0025385b71b0a0c1", "device__serial": "S4"}, "disk:wwid:eui.0025385b71b0a0c1"),
        ({"device__wwid": "naa.5000c500a1b2c3d4"}, "disk:device/wwid:naa.5000c500a1b2c3d4"),
        ({"serial": "vol-123"}, "disk:serial:vol-123"),
        ({"dm__uuid": "LVM-abc", "dm__name": "vg-lv"}, "disk:dm:LVM-abc"),
    ],
)
def test_a_disk_with_a_number_of_its_own_keeps_its_identity_wherever_it_is_plugged_in(
    tmp_path: Path, files: dict[str, str], value: str
) -> None:
    for place in ("pci/0/block/vda", "pci/1/block/vdb"):
        found = store_identity._disk(Sysfs(tmp_path).disk(place, diskseq="7", **files))
        assert (found.value, found.in_boot, found.strength) == (value, "", "strong")


def test_a_disk_without_a_number_is_told_by_its_place_and_by_the_boot_s_number(tmp_path: Path) -> None:
    found = store_identity._disk(Sysfs(tmp_path).disk("pci/usb1/block/sda", diskseq="7"))
    assert found.value.endswith("pci/usb1") and found.in_boot == "disk:seq:7" and found.strength == "weak"
    again = store_identity._disk(Sysfs(tmp_path).disk("pci/usb1/block/sdb", diskseq="9"))
    assert (again.value, again.in_boot) == (found.value, "disk:seq:9")


def test_the_order_in_which_drivers_found_a_disk_is_not_its_place(tmp_path: Path) -> None:
    sysfs = Sysfs(tmp_path)
    for first, second in (
        ("pci/ata1/host0/target0:0:1/0:0:1:2/block/sda", "pci/ata1/host3/target3:0:1/3:0:1:2/block/sdb"),
        ("pci/0000:00:05.0/virtio2/block/vda", "pci/0000:00:05.0/virtio9/block/vdb"),
    ):
        places = [store_identity._disk(sysfs.disk(each, diskseq="7")).value for each in (first, second)]
        assert places[0] == places[1]
    others = [
        store_identity._disk(sysfs.disk(f"pci/ata1/host0/target0:0:1/0:0:1:{unit}/block/sdx", diskseq="7"))
        for unit in range(3)
    ]
    assert len({each.value for each in others}) == 3


def test_a_usb_disk_is_told_by_the_serial_number_of_its_plug(tmp_path: Path) -> None:
    def plugged(port: int) -> Identity:
        sysfs = Sysfs(tmp_path)
        sysfs.disk(f"pci/usb1/1-{port}", serial="S1", idVendor="0781", idProduct="5581")
        return store_identity._disk(
            sysfs.disk(f"pci/usb1/1-{port}/host0/target0:0:0/0:0:0:0/block/sda", diskseq=str(port))
        )

    assert plugged(1) == plugged(2)
    assert (plugged(1).value, plugged(1).strength) == ("disk:usb:0781:5581:S1:0", "strong")


@pytest.mark.parametrize("name", ["zram0", "ram3"])
def test_a_disk_in_memory_ends_with_the_boot(tmp_path: Path, name: str) -> None:
    found = store_identity._disk(Sysfs(tmp_path).disk(f"virtual/block/{name}", diskseq="7"))
    assert (found.value, found.in_boot) == ("", "disk:seq:7")


def test_every_process_that_adopts_a_memory_disk_sees_the_same_identity() -> None:
    segment = OwnSegment.create(SIZE)
    adopted = OwnSegment.adopt(os.dup(segment.descriptor))
    other = OwnSegment.create(SIZE)
    first = memory_identity(segment.descriptor, "vol0")
    segment.close()
    assert memory_identity(adopted.descriptor, "vol0") == first
    assert memory_identity(other.descriptor, "vol0").in_boot != first.in_boot
    assert first.value == "" and first.ends_with_device
    adopted.close()
    other.close()
