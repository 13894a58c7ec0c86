"""The config file read again: checked as a whole, applied as far as it can be, and each device told what is left."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from click.testing import CliRunner

from support.fakes.daemon import running_daemon
from support.fakes.device_parts import SIZE_BYTES, fake_device
from support.served import Client, serving
from ublkpool.daemon.admin.wire import ReloadRequest, SetRequest
from ublkpool.daemon.cli.commands import cli
from ublkpool.daemon.device.context import DaemonContext
from ublkpool.daemon.device.disk import Disk
from ublkpool.daemon.device.table import DeviceTable
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.kernel.control_process import ControlRunner
from ublkpool.daemon.processes.mounts import NAMESPACE
from ublkpool.daemon.reload import Read, Reload, _change
from ublkpool.daemon.settings.config import DeviceConfig, ServeConfig
from ublkpool.daemon.settings.config_file import load_config
from ublkpool.daemon.status import Reloaded
from ublkpool.ublk import process_calls
from unit.test_supervisor import Systemd, systemd

__all__ = ["systemd"]
BEFORE = """
[daemon]
run_dir = "{run}"
state_dir = "{state}"

[[device]]
name = "vol0"
size = "1M"

[[device]]
name = "vol1"
size = "1M"
"""
NEW_WAY_OUT = "needs a new device: ublkpool del vol0, then read the config again"


class File:
    """A config file of two devices that wait for their backends, and the daemon that serves it."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "ublkpool.toml"
        self._before = BEFORE.format(run=directory / "run", state=directory / "state")
        self.write()

    def write(self, *changes: tuple[str, str], more: str = "") -> None:
        text = self._before
        for old, new in changes:
            assert old in text
            text = text.replace(old, new, 1)
        self.path.write_text(text + more)

    def serve(self, test: Callable[[Client], Awaitable[None]]) -> None:
        serving(load_config(self.path), test)


@pytest.fixture
def file(tmp_path: Path) -> File:
    return File(tmp_path)


async def reload(client: Client) -> dict[str, tuple[str, str]]:
    return {each["name"]: (each["done"], each["needs"]) for each in await client.ask(ReloadRequest())}


async def setting(client: Client, name: str, key: str) -> Any:
    settings = await client.ask(SetRequest(name=name))
    return next(each["value"] for each in settings if each["key"] == key)


def test_an_unchanged_file_changes_nothing(file: File) -> None:
    async def test(client: Client) -> None:
        assert await reload(client) == {"vol0": ("", ""), "vol1": ("", "")}

    file.serve(test)


def test_each_device_gets_what_can_change_and_is_told_what_needs_more(file: File) -> None:
    async def test(client: Client) -> None:
        file.write(
            ('size = "1M"', 'size = "1M"\nio_timeout = 5\nqueues = 4'),
            ('name = "vol1"', 'name = "vol2"'),
            ("[daemon]", '[daemon]\nlog_level = "debug"'),
        )
        assert await reload(client) == {
            "vol0": ("set io_timeout", f"queues: {NEW_WAY_OUT}"),
            "vol2": ("is being added", ""),
            "vol1": ("", "is no longer in the config; delete it with: ublkpool del vol1"),
            "daemon": ("", "log_level: needs a restart of the daemon"),
        }
        assert await setting(client, "vol0", "io_timeout") == "5"
        assert await setting(client, "vol0", "queues") == "1"
        assert await client.states() == {"vol0": "waiting", "vol1": "waiting", "vol2": "waiting"}

    file.serve(test)


@pytest.mark.parametrize(
    ("size", "needs"),
    [
        (2 * SIZE_BYTES, ""),
        (3 * SIZE_BYTES, f"size: grow it with: ublkpool resize vol {3 * SIZE_BYTES}"),
        (SIZE_BYTES // 2, "size: needs a new device: ublkpool del vol, then read the config again"),
    ],
)
def test_a_size_in_the_file_is_compared_with_the_disks_which_a_resize_may_have_grown(
    size: int, needs: str
) -> None:
    async def run() -> None:
        device = fake_device(DeviceConfig(name="vol", size_bytes=SIZE_BYTES))
        disk = Disk(size_bytes=SIZE_BYTES, block_bytes=512, volatile_cache=False, read_only=False)
        device.parts.resources.disk = disk.grown(2 * SIZE_BYTES)
        device.parts.life.state = "live"
        wanted = DeviceConfig(name="vol", size_bytes=size)
        assert await _change(device, wanted) == Reloaded(name="vol", needs=needs)

    asyncio.run(run())


def test_changed_metrics_and_prepared_devices_are_named_as_needing_a_restart(file: File) -> None:
    async def test(client: Client) -> None:
        file.write(more='[metrics]\nlisten = "unix"\n')
        assert (await reload(client))["daemon"] == ("", "metrics: needs a restart of the daemon")
        file.write(more="[prepare]\ndepth = 64\n")
        assert (await reload(client))["daemon"] == ("", "prepare: needs a restart of the daemon")
        file.write()
        assert "daemon" not in await reload(client)

    file.serve(test)


def test_a_reload_makes_the_values_of_the_file_hold_again(file: File) -> None:
    async def test(client: Client) -> None:
        await client.ask(SetRequest(name="vol0", values={"on_absent": "fail"}))
        assert (await reload(client))["vol0"] == ("set on_absent", "")
        assert await setting(client, "vol0", "on_absent") == "wait"

    file.serve(test)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("[daemon]", "[daemon", "not TOML"),
        (
            'name = "vol1"',
            'name = "vol1"\nio_timeout = -1',
            'device "vol1": io_timeout: expected float > 0.0',
        ),
        ('name = "vol1"', 'name = "vol0"', "'vol0' is already taken"),
    ],
)
def test_a_file_with_a_mistake_changes_nothing(
    file: File, old: str, new: str, said: str, systemd: Systemd, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(client: Client) -> None:
        systemd.told()
        file.write(('size = "1M"', 'size = "1M"\nio_timeout = 5'), (old, new))
        with pytest.raises(DaemonError, match=said):
            await reload(client)
        assert await setting(client, "vol0", "io_timeout") == "30"
        assert len([each for each in caplog.messages if "the config was not read again" in each]) == 1
        begun, ended = (each for each in systemd.told() if not each.startswith("STATUS="))
        assert begun.startswith("RELOADING=1\nMONOTONIC_USEC=")
        assert ended.startswith("READY=1\nSTATUS=") and "the config was not read again: " in ended
        file.write()
        await reload(client)
        last = [each for each in systemd.told() if each.startswith("READY=1")][-1]
        assert "not read again" not in last

    file.serve(test)


def test_a_file_that_is_gone_is_one_line_and_changes_nothing(file: File) -> None:
    async def test(client: Client) -> None:
        file.path.unlink()
        with pytest.raises(DaemonError, match="No such file or directory"):
            await reload(client)
        assert await client.states() == {"vol0": "waiting", "vol1": "waiting"}

    file.serve(test)


def read_again(file: Path, live_mounts: int) -> Read:
    """What a daemon reads whose backends run in this mount namespace."""
    context = cast(
        DaemonContext, SimpleNamespace(runner=ControlRunner(), live_mounts=live_mounts, is_privileged=True)
    )
    return asyncio.run(Reload(ServeConfig(file=file), context, cast(DeviceTable, {}))._read())


def test_the_file_is_read_in_the_mount_namespace_in_which_backends_run(
    file: File, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = file.path.rename(tmp_path / "elsewhere")
    live = os.open(NAMESPACE, os.O_RDONLY | os.O_CLOEXEC)

    def enter(fd: int) -> None:
        """The file appears when the process enters that namespace."""
        assert os.path.sameopenfile(fd, live)
        elsewhere.rename(file.path)

    monkeypatch.setattr(process_calls, "enter_mounts", enter)
    try:
        assert [each.name for each in read_again(file.path, live).devices] == ["vol0", "vol1"]
    finally:
        os.close(live)


def test_a_mount_namespace_that_cannot_be_entered_is_an_error_and_the_file_is_not_read(file: File) -> None:
    with file.path.open() as no_namespace, pytest.raises(DaemonError, match="enter a mount namespace"):
        read_again(file.path, no_namespace.fileno())


def test_a_daemon_without_a_config_file_has_none_to_read(tmp_path: Path) -> None:
    async def test(client: Client) -> None:
        with pytest.raises(DaemonError, match="without a config file"):
            await reload(client)

    serving(ServeConfig(run_dir=tmp_path / "run", state_dir=tmp_path / "state"), test)


def test_sighup_reads_the_file_and_the_log_has_the_result(
    file: File, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    async def test(client: Client) -> None:
        file.write(('size = "1M"', 'size = "1M"\nio_timeout = 5\nqueues = 4'))
        os.kill(os.getpid(), signal.SIGHUP)
        while await setting(client, "vol0", "io_timeout") != "5":
            await asyncio.sleep(0.01)
        while f"vol0: queues: {NEW_WAY_OUT}" not in caplog.messages:
            await asyncio.sleep(0.01)
        assert "vol0: set io_timeout" in caplog.messages
        file.path.write_text("[")
        os.kill(os.getpid(), signal.SIGHUP)
        while not any("not TOML" in each for each in caplog.messages):
            await asyncio.sleep(0.01)

    file.serve(test)


def test_reload_prints_what_became_of_each_device_and_fails_if_something_is_left(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon:
        arguments = ["reload", "--run-dir", str(tmp_path)]
        daemon.service.reloaded = [
            Reloaded(name="vol0", done="set io_timeout"),
            Reloaded(name="vol1", done="is being added"),
            Reloaded(name="vol2"),
        ]
        result = CliRunner().invoke(cli, arguments)
        assert (result.exit_code, result.output) == (0, "vol0: set io_timeout\nvol1: is being added\n")
        daemon.service.reloaded = [Reloaded(name="vol0", done="set io_timeout", needs="queues: needs more")]
        result = CliRunner().invoke(cli, arguments)
        assert (result.exit_code, result.output) == (
            1,
            "vol0: set io_timeout\nvol0: queues: needs more\n",
        )
        daemon.service.config_problems = ["x.toml: device[0].size: is missing"]
        result = CliRunner().invoke(cli, arguments)
        assert (result.exit_code, result.stderr) == (2, "ublkpool: x.toml: device[0].size: is missing\n")
