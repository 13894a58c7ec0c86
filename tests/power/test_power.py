"""A guest that loses its power keeps what FLUSH and FUA promised: `file` and `cow` on a disk with a volatile cache."""

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.guest.boot import Machine
from support.guest.cache import GuestCache
from support.guest.qemu import Spec
from support.power.blocks import base_content, broken_promises, parse_promises
from support.vm.volatile_disk import VolatileDisk
from ublkpool.backends._cow_format import read_head
from ublkpool.backends._cow_volumes import CowVolumeOptions, CowVolumes

KERNELS = os.environ.get("UBLKPOOL_KERNELS", "").split()
DISK_BYTES = 64 << 20
PROMISES = (150, 500)
"""The range of lines of promises (one per FLUSH or FUA write) after which the power fails; the seed picks."""
OUTCOMES = 6
TIMEOUT_S = 1800
PROJECT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Failed:
    """A guest that has lost its power: the promises that it printed, and its possible disks afterwards."""

    promised: dict[str, dict[int, int]]
    disk: VolatileDisk
    images: list[Path]


@pytest.fixture(scope="module", params=KERNELS or ["none"])
def guest(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Failed]:
    """One boot, and one power failure."""
    seed = int(os.environ.get("UBLKPOOL_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"\nUBLKPOOL_SEED={seed}")
    scratch = tmp_path_factory.mktemp("power")
    disk = VolatileDisk(make_file_system(scratch / "empty"), seed)
    said = fail_power(request.param, disk, scratch / "nbd", seed)
    images = []
    for number in range(OUTCOMES):
        image = scratch / f"found-{number}"
        # The first is the worst case: only durable writes are there.
        image.write_bytes(disk.after_power_failure(seed + number if number else None))
        images.append(image)
    yield Failed(parse_promises(said.splitlines()), disk, images)
    for image in images:
        image.unlink()


def make_file_system(path: Path) -> bytes:
    """An empty ext4 image."""
    path.write_bytes(b"")
    os.truncate(path, DISK_BYTES)
    subprocess.run(["mkfs.ext4", "-q", "-F", path], check=True)
    content = path.read_bytes()
    path.unlink()
    return content


def fail_power(kernel: str, disk: VolatileDisk, path: Path, seed: int) -> str:
    """Let the guest write until the chosen moment; returns its output."""
    said = bytearray()
    count = random.Random(seed).randint(*PROMISES)
    blockdev = f"driver=nbd,node-name=power,server.type=unix,server.path={path},cache.direct=on"
    python = ["env", f"PYTHONPATH={PROJECT / 'tests'}", sys.executable]
    command = [*python, "-m", "support.power.writer", str(seed)]
    spec = Spec(
        kernel,
        command,
        cpus=2,
        mem_mib=2048,
        timeout_s=TIMEOUT_S,
        modules=["virtio_blk"],
        cwd=PROJECT,
        devices=["-blockdev", blockdev, "-device", "virtio-blk-pci,drive=power,write-cache=on"],
    )
    with disk.served(path), Machine(spec, GuestCache(), said.extend) as machine:
        failed = machine.fail_power(lambda: said.count(b"\nP ") >= count)
        assert failed, (
            f"the guest has not come so far:\n{said.decode(errors='replace')}\n{machine.log[-5000:]}"
        )
    # The power may have failed within a line.
    return said[: said.rfind(b"\n") + 1].decode()


def read_file(image: Path, name: str) -> bytes:
    """A file in the image, read after the journal's replay that a mount would do."""
    with found_files(image, name) as (target,):
        return target.read_bytes()


@contextmanager
def found_files(image: Path, *names: str) -> Iterator[list[Path]]:
    """Copies of files in the image, after the journal's replay that a mount would do."""
    checked = image.with_suffix(".checked")
    checked.write_bytes(image.read_bytes())
    replayed = subprocess.run(["e2fsck", "-fp", checked], capture_output=True, text=True)
    # Status 1: e2fsck made corrections, at least the journal's replay.
    assert replayed.returncode <= 1, replayed.stdout + replayed.stderr
    targets = [image.with_suffix(f".{name}") for name in names]
    for name, target in zip(names, targets, strict=True):
        dumped = subprocess.run(
            ["debugfs", "-R", f"dump /{name} {target}", checked], capture_output=True, text=True
        )
        assert target.exists(), dumped.stderr
    yield targets
    for each in (checked, *targets):
        each.unlink()


def read_overlay(image: Path) -> bytes:
    """The disk of the device `cow` as the next boot would serve it: this machine's boot is not the guest's."""
    with found_files(image, "base", "cow") as (base, overlay):
        assert base.read_bytes() == base_content()
        with overlay.open("rb") as file:
            changed_ns = read_head(file.fileno(), overlay).base_mtime_ns
        os.utime(base, ns=(changed_ns, changed_ns))
        committed = image.with_suffix(".committed")
        CowVolumes(CowVolumeOptions(overlay, base)).commit(str(committed), lambda done, size: None)
        content = committed.read_bytes()
        committed.unlink()
        return content


@pytest.mark.parametrize("device", ["direct", "buffered"])
def test_what_was_promised_is_there_after_a_power_failure(guest: Failed, device: str) -> None:
    promised = guest.promised[device]
    # Otherwise the power failure could lose nothing.
    assert len(promised) > 20
    assert guest.disk.flush_count > 20
    for image in guest.images:
        assert broken_promises(device, promised, read_file(image, device)) == []


def test_an_overlay_has_what_was_promised_after_a_power_failure(guest: Failed) -> None:
    promised = guest.promised["cow"]
    assert len(promised) > 20
    for image in guest.images:
        found = read_overlay(image)
        assert broken_promises("cow", promised, found) == []


def test_a_backend_that_ignores_flush_is_caught(guest: Failed) -> None:
    assert len(guest.promised["liar"]) > 20
    broken = [
        broken_promises("liar", guest.promised["liar"], read_file(image, "liar")) for image in guest.images
    ]
    assert broken[0]
