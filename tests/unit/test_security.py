"""SECURITY.md names every socket and file of a running daemon, with the mode and group that they have."""

import asyncio
import grp
import os
import pwd
import re
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import posix_ipc
import pytest

from support.served import Client, serving
from ublkpool.bufpool.pool.memory import SHM_DIRECTORY, make_named
from ublkpool.bufpool.sdk.client import OwnSegment
from ublkpool.bufpool.sdk.keeper import Keeper, keeper_path
from ublkpool.daemon.device.records import Record, Records
from ublkpool.daemon.device.state_file import Write
from ublkpool.daemon.kernel.disk_names import DiskNames
from ublkpool.daemon.settings.config import DeviceConfig, ServeConfig
from ublkpool.daemon.settings.listen import ListenAddress
from ublkpool.workers.listening import listen, socket_mode

DOCUMENT = Path(__file__).parents[2] / "SECURITY.md"
WORKERS = "daemon"
"""A user of every system, as which the broker runs in one of the tests."""
_ROW = re.compile(r"^\| `([^`]+)` \| (\d{4})( group)? \| (\d{4})( group)? \| (.*) \|$", re.MULTILINE)
_OF_WORKERS = re.compile(r"(\d{4})(?: or (\d{4}))?( of their group)? if workers have a user")
_PLACEHOLDERS = {"NAME": "[a-z][a-z0-9.]*", "N": r"\d+", "Q": r"\d+", "SEQUENCE": r"\d+"}
NAME = "vol0"


class Entry(NamedTuple):
    """A row of the table: which paths it is about, their mode, and whether they are the group's."""

    path: str
    mode: int
    is_group_s: bool
    is_workers: bool = False
    """Whether it is the group's of the workers' user."""

    def covers(self, path: str) -> bool:
        """Whether this row is about the path."""
        parts = re.split(r"(SEQUENCE|NAME|\bN\b|\bQ\b)", self.path)
        return bool(re.fullmatch("".join(_PLACEHOLDERS.get(each, re.escape(each)) for each in parts), path))


def table(with_group: bool, with_user: bool = False) -> list[Entry]:
    """The document's rows about a daemon with or without a group, and with or without a user for its workers."""
    made = []
    for path, mode, by_none, group_mode, by_group, text in _ROW.findall(DOCUMENT.read_text()):
        entry = Entry(
            path, int(group_mode if with_group else mode, 8), bool(by_group if with_group else by_none)
        )
        if with_user and (other := _OF_WORKERS.search(text)):
            shown = other[2] if with_group and other[2] else other[1]
            entry = entry._replace(mode=int(shown, 8), is_workers=bool(other[3]))
        made.append(entry)
    return made


def a_group() -> grp.struct_group:
    """A group that this process may give files to, and that is not its own if it is root."""
    others = (os.getegid(), pwd.getpwnam(WORKERS).pw_gid)
    known = [each for each in grp.getgrall() if each.gr_gid not in others]
    return known[0] if os.geteuid() == 0 and known else grp.getgrgid(os.getegid())


def below(directory: Path, shown: str) -> Iterator[tuple[str, Path]]:
    """The directory and everything in it, each as the document names it."""
    yield shown, directory
    for each in directory.rglob("*"):
        yield f"{shown}/{each.relative_to(directory)}", each


def add_devices_things(run_dir: Path, state_dir: Path, root: Path, group: int | None) -> None:
    """What needs the driver or a backend to appear, made by the functions that make it then."""
    queues = run_dir / "queues"
    for name in ("0.0", "0.0.ring"):
        listen(queues / name, socket.SOCK_STREAM, socket_mode(group), group, 1).close()
    Records(run_dir / "devices").save(Record(config=DeviceConfig(name=NAME)))
    Write(state_dir / f"{NAME}.json", b"{}")()
    sequence = root / "sys/class/block/ublkb0/diskseq"
    sequence.parent.mkdir(parents=True)
    sequence.write_text("7")
    (root / "run").mkdir()
    DiskNames(root).publish(NAME, "ublkb0", lambda: None)


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every user can pass, which pytest's own is not."""
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o711)
        yield Path(made)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root's workers become another user")


@pytest.mark.parametrize("with_user", [False, pytest.param(True, marks=needs_root)])
@pytest.mark.parametrize("with_group", [False, True])
def test_every_socket_and_file_has_the_mode_and_group_that_the_document_says(
    place: Path, with_group: bool, with_user: bool
) -> None:
    tmp_path = place
    run_dir, state_dir, root = tmp_path / "run", tmp_path / "state", tmp_path / "root"
    group = a_group() if with_group else None
    shm = f"/ublkpool-test{os.getpid()}-0-ctl"
    keeper = Keeper(keeper_path(run_dir, NAME))
    found: dict[str, Path] = {}
    # The broker, the exporter and the process that writes events make them when they have begun.
    names = ("metrics.sock", "metrics.json", "pool.sock")
    later = [state_dir / "events.jsonl", *(run_dir / each for each in names)]

    async def look(_: Client) -> None:
        while not all(each.exists() for each in later):
            await asyncio.sleep(0.01)
        while with_user and (run_dir / "pool.sock").stat().st_gid != pwd.getpwnam(WORKERS).pw_gid:
            await asyncio.sleep(0.01)
        add_devices_things(run_dir, state_dir, root, group and group.gr_gid)
        segment = OwnSegment.create(4096)
        keeper.keep(segment)
        segment.close()
        descriptor = make_named(shm, 4096)
        try:
            found.update(below(run_dir, "RUN_DIR"))
            found.update(below(state_dir, "STATE_DIR"))
            found.update(below(root / "run/ublkpool-names", "/run/ublkpool-names"))
            found[f"/dev/shm{shm}"] = SHM_DIRECTORY / shm[1:]
            check(found, table(with_group, with_user), group)
        finally:
            os.close(descriptor)
            posix_ipc.unlink_shared_memory(shm)
            keeper.drop()
            (run_dir / f"devices/{NAME}.json").unlink()

    config = ServeConfig(
        run_dir=run_dir,
        state_dir=state_dir,
        group=group and group.gr_name,
        metrics=ListenAddress(path=run_dir / "metrics.sock"),
        user=WORKERS if with_user else None,
    )
    serving(config, look)


def check(found: dict[str, Path], entries: list[Entry], group: grp.struct_group | None) -> None:
    """Compare all that was found with the table, and the table with all that was found."""
    matching = {shown: [each for each in entries if each.covers(shown)] for shown in found}
    assert [shown for shown, rows in matching.items() if len(rows) != 1] == []
    seen = {rows[0].path for rows in matching.values()}
    assert [each.path for each in entries if each.path not in seen] == []
    owner, own_group = os.geteuid(), os.getegid()
    wrong = []
    for shown, path in found.items():
        (row,), about = matching[shown], path.lstat()
        wanted_group = group.gr_gid if row.is_group_s and group else own_group
        if row.is_workers:
            wanted_group = pwd.getpwnam(WORKERS).pw_gid
        wanted = (row.mode, owner, wanted_group)
        if (stat.S_IMODE(about.st_mode), about.st_uid, about.st_gid) != wanted:
            wrong.append((shown, oct(about.st_mode), about.st_uid, about.st_gid))
    assert wrong == []


def test_the_table_says_who_gets_in_by_group_only_where_there_is_one() -> None:
    assert [each.path for each in table(with_group=False) if each.is_group_s] == []
    assert {each.path for each in table(with_group=True) if each.is_group_s} >= {
        "RUN_DIR",
        "RUN_DIR/attach.sock",
    }
