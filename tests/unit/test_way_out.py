"""Errors for exhausted or forbidden resources name the resource, its owner and the way out."""

import errno
import os
import resource
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import click
import posix_ipc
import pytest
from click.testing import CliRunner

from support.cli_commands import cli_commands
from support.fakes.queue_desk import Desk
from ublkpool.bufpool import way_out
from ublkpool.bufpool.errors import BackendError, PoolError
from ublkpool.bufpool.pool.memory import _no_space, make_named
from ublkpool.bufpool.sdk.client import describe
from ublkpool.bufpool.sdk.keeper import Keeper, keeper_path
from ublkpool.bufpool.way_out import RUN_DIR_BYTES_MAX, explain, why_no_ring
from ublkpool.daemon.cli.commands import cli
from ublkpool.daemon.device.records import Record, Records
from ublkpool.daemon.errors import ConfigError, DaemonError, one_line
from ublkpool.daemon.processes import unix_socket
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.daemon.settings.config_file import load_config
from ublkpool.ublk import errors as ublk_errors
from ublkpool.ublk.errors import UblkError
from ublkpool.workers.ring_link import RingLink


def failure(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def test_a_process_without_free_descriptors_is_named_with_its_limit() -> None:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = explain(failure(errno.EMFILE))
    assert text.startswith(f"Too many open files: process {os.getpid()} (ublkpool")
    assert f"all {limit} files" in text and "ulimit -n" in text and "LimitNOFILE=" in text
    assert "ulimit -n" in str(UblkError("/dev/ublk-control", errno.EMFILE))


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENFILE, "fs.file-max"),
        (errno.ENOSPC, "its file system is full"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "Read-only file system"),
        (errno.EACCES, "Permission denied"),
        (errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_an_exhausted_resource_is_named(number: int, words: str) -> None:
    assert words in explain(failure(number))
    assert "\n" not in explain(failure(number))


@contextmanager
def full_file_system(directory: Path) -> Iterator[Path]:
    """A directory in which no more file can be made."""
    directory.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4k,nr_inodes=2", "full", str(directory)], check=False
    )
    if made.returncode:
        pytest.skip("needs the right to mount")
    try:
        (directory / "last").touch()
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def save_record(directory: Path) -> None:
    # The directory exists already.
    records = Records(directory)
    records.save(Record(config=DeviceConfig(name="vol0")))


def listen_for_rings(directory: Path) -> None:
    link = RingLink(directory / "0.0.ring", Desk(depth=1, connected=False).queue, 0o600, None)
    try:
        link.expect(b"x" * 16, os.geteuid())
    finally:
        link.close()


def listen_for_commands(directory: Path) -> None:
    unix_socket.listen(directory / "admin.sock", socket.SOCK_STREAM)


@pytest.mark.parametrize("work", [save_record, listen_for_rings, listen_for_commands])
def test_a_full_run_directory_is_named(tmp_path: Path, work: Callable[[Path], None]) -> None:
    with full_file_system(tmp_path / "run") as directory:
        with pytest.raises((OSError, DaemonError)) as caught:
            work(directory)
        said = one_line(caught.value)
    assert str(directory) in said and "its file system is full" in said


@pytest.fixture
def io_uring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets the kernel's io_uring settings as the error texts read them."""
    disabled, group = tmp_path / "io_uring_disabled", tmp_path / "io_uring_group"
    group.write_text("998\n")
    for module in (way_out, ublk_errors):
        monkeypatch.setattr(module, "_IO_URING_DISABLED", disabled)
    monkeypatch.setattr(way_out, "_IO_URING_GROUP", group)

    def set_disabled(value: str) -> None:
        disabled.write_text(f"{value}\n")

    return set_disabled


def test_a_machine_that_forbids_io_uring_is_told_how_to_allow_it(io_uring: Callable[[str], None]) -> None:
    io_uring("2")
    for said in (why_no_ring(errno.EPERM), str(UblkError("GET_FEATURES", errno.EPERM))):
        assert "kernel.io_uring_disabled = 2" in said and "sysctl kernel.io_uring_disabled=0" in said
    io_uring("1")
    assert "member of the group with number kernel.io_uring_group, which is 998" in why_no_ring(errno.EPERM)
    assert "kernel.io_uring_group" in str(UblkError("GET_FEATURES", errno.EPERM))
    io_uring("0")
    assert "io_uring" not in why_no_ring(errno.EPERM)
    assert str(UblkError("GET_FEATURES", errno.EPERM)).endswith("run as root (CAP_SYS_ADMIN)")
    assert "CONFIG_IO_URING" in why_no_ring(errno.ENOSYS)


LONG = Path("/tmp") / ("x" * 105)


def test_a_run_directory_whose_sockets_would_have_too_long_paths_is_refused_by_every_command() -> None:
    assert len(str(LONG)) == 110
    commands = cli_commands()
    # Volumes are made without a daemon.
    del commands["volume"]
    for name, command in commands.items():
        required = [
            word for each in command.params if isinstance(each, click.Argument) for word in _word(each)
        ]
        options = ["--device", "x"] if name == "backend" else []
        result = CliRunner().invoke(
            cli, [name, "--run-dir", str(LONG), *options, *required], prog_name="ublkpool"
        )
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1), (name, result)
        assert f"{LONG} has 110 bytes, at most {RUN_DIR_BYTES_MAX} fit" in result.stderr, result.stderr


def _word(argument: click.Argument) -> list[str]:
    return ["x"] if argument.required else []


def test_a_run_directory_that_just_fits_is_used(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        fits = Path(short) / ("x" * (RUN_DIR_BYTES_MAX - len(short) - 1))
        fits.mkdir()
        listener = unix_socket.listen(
            Path(f"{fits}{way_out.QUEUE_SOCKET}".replace("/queues", "")), socket.SOCK_STREAM
        )
        listener.close()


def test_the_config_and_the_sdk_refuse_it_too(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text(f'[daemon]\nrun_dir = "{LONG}"\n')
    with pytest.raises(ConfigError, match=f"run_dir: {LONG} has 110 bytes, at most"):
        load_config(file)
    with pytest.raises(BackendError, match=f"run directory {LONG} has 110 bytes, at most"):
        describe(LONG, "vol0")


def test_a_memory_disk_whose_keepers_path_is_too_long_says_how_long_it_may_be(tmp_path: Path) -> None:
    path = keeper_path(tmp_path, "v" * 100)
    with pytest.raises(BackendError) as caught:
        Keeper(path).adopt()
    assert f"{path} has {len(str(path))} bytes, the path of a socket at most 107" in str(caught.value)
    assert "keep=off does without" in str(caught.value)


def test_the_advice_for_a_full_dev_shm_names_the_key_that_the_config_has() -> None:
    advice = str(_no_space("a pool", 1 << 40))
    assert "queues, depth or pool," in advice and "pool_bytes" not in advice


@pytest.mark.parametrize(
    ("free_blocks", "free_inodes", "words"),
    [
        (3, 7, "needs 20 KiB of .* where 12 KiB are free: .* larger size"),
        (3, 0, "no inodes left: .* nr_inodes"),
    ],
)
def test_a_full_dev_shm_is_told_from_one_without_inodes(
    monkeypatch: pytest.MonkeyPatch, free_blocks: int, free_inodes: int, words: str
) -> None:
    usage = SimpleNamespace(f_files=100, f_favail=free_inodes, f_bavail=free_blocks, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda _: usage)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(posix_ipc, "SharedMemory", full)
    with pytest.raises(PoolError, match=words) as caught:
        make_named("/ublkpool-unit-7-ctl", 20480)
    assert "0.0" not in str(caught.value)


def test_a_control_device_that_cannot_be_opened_for_want_of_descriptors_says_so() -> None:
    code = (
        "import resource, sys; from ublkpool.daemon.errors import one_line\n"
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))\n"
        "try:\n    open('/dev/null')\nexcept OSError as error:\n    print(one_line(error))\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "/dev/null: Too many open files: process " in said and "all 3 files" in said
