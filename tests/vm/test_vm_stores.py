"""The store of a file backend: held exclusively, may grow, and an unusable one is named in the reason."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.vm.daemon import Daemon, eventually, eventually_nothing
from support.vm.files import make_file_system, mounted, run
from support.vm.process import Command, Forked, read_block, run_command, write_block
from support.vm.recovery import kill, loaded, wait_for_backend

pytestmark = pytest.mark.one_kernel("6.12")
MIB = 1 << 20
BLOCK = 4096
EXT4_MAGIC_AT = 1024 + 0x38


@contextmanager
def looped(path: Path, size_bytes: int) -> Iterator[str]:
    """A loop device on a new file."""
    with path.open("wb") as file:
        file.truncate(size_bytes)
    run("modprobe", "loop")
    name = run("losetup", "--find", "--show", path).strip()
    try:
        yield name
    finally:
        run("losetup", "--detach", name)
        path.unlink()


def refusal(daemon: Daemon, *words: str) -> str:
    """The error line of an `add` that is refused for its options."""
    ran = run_command(daemon, "add", "refused", "--backend", "file", *words)
    assert (ran.status, ran.out, ran.err.count("\n")) == (2, "", 1), ran
    return ran.err


def test_a_block_device_in_use_is_refused_with_its_user_and_can_be_read(daemon: Daemon) -> None:
    with looped(daemon.path("loop.img"), 16 * MIB) as loop:
        make_file_system("ext4", loop)
        with mounted(loop, daemon.path("mnt")):
            said = refusal(daemon, f"path={loop}")
            assert f"path={loop}: in use: {Path(loop).name} is mounted at {daemon.path('mnt')}" in said
            with daemon.device("reader", "file", options={"path": loop, "readonly": "on"}) as reader:
                assert reader.path is not None
                assert read_block(reader.path, 0, BLOCK)[EXT4_MAGIC_AT:][:2] == b"\x53\xef"
        with daemon.device("alone", "file", options={"path": loop}) as alone:
            with pytest.raises(OSError, match="busy"):
                os.open(loop, os.O_RDWR | os.O_EXCL)
            said = refusal(daemon, f"path={loop}")
            assert "held exclusively by process" in said and "the ublkpool backend of alone" in said
            assert f"process {alone.backend.pid} " in said
            assert alone.path is not None
            _check_that_a_disk_on_a_disk_holds_it(daemon, alone.path)


def _check_that_a_disk_on_a_disk_holds_it(daemon: Daemon, path: str) -> None:
    with daemon.device("upper", "file", options={"path": path}) as upper:
        assert upper.path is not None
        assert write_block(upper.path, 0, b"u" * BLOCK) == 0
        assert "held exclusively by process" in refusal(daemon, f"path={path}")
    assert read_block(path, 0, BLOCK) == b"u" * BLOCK


def test_a_killed_backend_of_a_block_device_is_succeeded_under_load(daemon: Daemon) -> None:
    with (
        looped(daemon.path("loop.img"), 32 * MIB) as loop,
        loaded(daemon, [daemon.add("block", "file", {"path": loop})]) as (load,),
    ):
        for _ in range(3):
            load.goes_on()
            before = daemon.status("block").backend.pid
            assert before is not None
            kill(before)
            wait_for_backend(daemon, "block", before)


def test_a_disk_is_not_served_from_itself(daemon: Daemon) -> None:
    image = daemon.path("not-itself")
    image.write_bytes(bytes(4 * MIB))
    status = daemon.add("own", size_bytes=4 * MIB)
    first = daemon.backend("file", "own", path=image)
    status = daemon.wait_live("own")
    first.end(signal.SIGKILL)
    second = daemon.backend("file", "own", path=status.path)
    assert second.wait() == 2
    assert f"path={status.path}: lies on {status.path}" in second.said()
    daemon.backends.remove(first)
    daemon.backends.remove(second)
    third = daemon.backend("file", "own", path=image)
    eventually(lambda: daemon.status("own").backend.attached, "the right one is taken")
    daemon.delete("own")
    assert third.wait() == 0


def test_a_store_that_grew_goes_on_and_one_that_shrank_is_named_until_it_is_whole_again(
    daemon: Daemon,
) -> None:
    image = daemon.path("grows")
    options = {"path": image, "size": "8M"}
    with daemon.device("grows", "file", options=options) as status:
        assert status.path is not None
        assert write_block(status.path, 8 * MIB - BLOCK, b"e" * BLOCK) == 0
        for size_bytes in (16 * MIB, 16 * MIB + 100):
            os.truncate(image, size_bytes)
            _kill_backend(daemon, "grows")
            assert read_block(status.path, 8 * MIB - BLOCK, BLOCK) == b"e" * BLOCK
            _check_that_nothing_is_said(daemon, "grows")
        os.truncate(image, 4 * MIB)
        kill(daemon.status("grows").backend.pid or 0)
        eventually(
            lambda: "has 4194304 bytes, fewer than" in daemon.status("grows").reason, "the reason is told"
        )
        reader = Forked(lambda: int(len(read_block(str(status.path), 0, BLOCK)) != BLOCK))
        _check_that_every_command_says(
            daemon, "grows", f"path={image}: has 4194304 bytes, fewer than size=8M"
        )
        os.truncate(image, 8 * MIB)
        assert reader.wait() == 0
        _check_that_nothing_is_said(daemon, "grows")


def _check_that_nothing_is_said(daemon: Daemon, name: str) -> None:
    eventually_nothing(lambda: daemon.status(name).reason + daemon.stats(name).reason, "it is served")


def _kill_backend(daemon: Daemon, name: str) -> None:
    before = daemon.status(name).backend.pid
    assert before is not None
    kill(before)
    wait_for_backend(daemon, name, before)


def _check_that_every_command_says(daemon: Daemon, name: str, reason: str) -> None:
    for command in ("list", "stats"):
        table, objects = run_command(daemon, command), run_command(daemon, command, "--json")
        assert reason in table.out and "requests wait" in table.out, table
        (found,) = (each for each in json.loads(objects.out) if each["name"] == name)
        assert reason in found["reason"]


def test_what_another_device_serves_is_refused_in_time_and_an_add_that_is_given_up_is_undone(
    daemon: Daemon,
) -> None:
    image = daemon.path("image")
    with daemon.device("first", "file", options={"path": image, "size": "4M"}) as first:
        said = refusal(daemon, f"path={image}")
        assert f"path={image}: locked by process {first.backend.pid} (" in said
        assert "the ublkpool backend of first" in said
        hangs = daemon.path("hangs.py")
        hangs.write_text("import time\ntime.sleep(3600)\n")
        given_up = Command(daemon, "add", "second", "--size", "1M", "--backend", str(hangs))
        eventually(lambda: _names(daemon) == ["first", "second"], "the second is being made")
        given_up.kill()
        eventually(lambda: _names(daemon) == ["first"], "and undone")
        external = daemon.backend("file", "first", path=image)
        assert external.wait() != 0
        assert f"locked by process {first.backend.pid}" in external.said()
        daemon.backends.remove(external)


def _names(daemon: Daemon) -> list[Any]:
    return [each.name for each in daemon.client.devices()]


def test_list_says_why_a_backend_was_refused_while_requests_wait(daemon: Daemon) -> None:
    small = daemon.path("small")
    small.write_bytes(bytes(MIB))
    daemon.add("waits", size_bytes=4 * MIB)
    first = daemon.backend("memory", "waits", keep="off")
    daemon.wait_live("waits")
    first.end(signal.SIGKILL)
    daemon.backends.remove(first)
    eventually(lambda: "no backend is attached, requests wait" in daemon.status("waits").reason, "it is told")
    refused = daemon.backend("memory", "waits", size="1M", keep="off")
    assert refused.wait() != 0
    daemon.backends.remove(refused)
    _check_that_every_command_says(daemon, "waits", "this backend only 1048576")
    daemon.backend("memory", "waits", keep="off")
    _check_that_nothing_is_said(daemon, "waits")
    daemon.delete("waits")
