"""A backend that the daemon runs as another user: its rights, what lets it in, and each refusal."""

import asyncio
import logging
import os
import pwd
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import msgspec
import pytest

from support.fakes.device_parts import FakeSession, FakeTeam, fake_device, turn
from ublkpool.bufpool.errors import AttachRefused
from ublkpool.bufpool.sdk import process as sdk_process
from ublkpool.daemon.backends.backend_process import BackendProcess
from ublkpool.daemon.backends.backend_user import check_can_run
from ublkpool.daemon.errors import STATUS_USAGE, ConfigError
from ublkpool.daemon.kernel.control_process import LOOKS_MAX, ControlFailed
from ublkpool.daemon.settings.changes import changed
from ublkpool.daemon.settings.config import BackendConfig, DeviceConfig, Problem, check_device
from ublkpool.daemon.settings.config_file import load_config
from ublkpool.workers.privileges import Account

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root runs a backend as another user")
NOBODY = "nobody"
GROUP = 7
DEADLINE_S = 60
PF_MEMALLOC_NOIO = 0x00080000
"""What PR_SET_IO_FLUSHER sets (include/linux/sched.h)."""
SHOWS_ITSELF = """#!/bin/sh
grep -E '^(Uid|Groups|Cap...|NoNewPrivs):' /proc/self/status
echo "home $HOME user $USER flusher $UBLKPOOL_IO_FLUSHER_SET"
read -r stat < /proc/self/stat
echo "stat ${stat##*) }"
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every user can enter, which pytest's own is not."""
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o755)
        yield Path(made)


def ran_as(place: Path, config: BackendConfig, caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines that a program prints which runs in place of the interpreter."""
    program = place / "interpreter"
    program.write_text(SHOWS_ITSELF)
    program.chmod(0o755)

    async def run() -> None:
        backend = msgspec.structs.replace(config, python=str(program), cwd="/")
        process = BackendProcess("vol0", backend, place, lambda _fd: None, None, GROUP)
        process.start()
        await asyncio.wait_for(process.child.wait(), DEADLINE_S)
        process.obituary()

    with caplog.at_level(logging.INFO):
        asyncio.run(run())
    return [each.getMessage().removeprefix("vol0: ") for each in caplog.records]


@needs_root
def test_a_backend_with_a_user_runs_without_rights_and_in_the_daemon_s_group(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = ran_as(place, BackendConfig(kind="null", user=NOBODY), caplog)
    shown = {name: value.split() for name, _, value in (line.partition(":") for line in said)}
    assert set(shown["Uid"]) == {"65534"}
    assert str(GROUP) in shown["Groups"]
    assert "0" not in shown["Groups"]
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(shown[name][0], 16) == 0, name
    assert shown["NoNewPrivs"] == ["1"]
    (place_of,) = [line for line in said if line.startswith("home ")]
    assert f" user {NOBODY} " in place_of
    assert "/root" not in place_of
    # Root without CAP_SYS_RESOURCE cannot set it, and does not say that it did.
    (flags,) = [int(line.split()[7]) for line in said if line.startswith("stat ")]
    assert bool(flags & PF_MEMALLOC_NOIO) == place_of.endswith("flusher 1")


def test_a_backend_without_a_user_runs_as_the_daemon(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    said = ran_as(place, BackendConfig(kind="null"), caplog)
    assert any(line.split() == ["Uid:", *[str(os.geteuid())] * 4] for line in said)


def test_a_daemon_that_cannot_run_it_says_why_and_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = BackendConfig(kind="null", user=NOBODY)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    check_can_run("vol0", config, GROUP)
    check_can_run("vol0", BackendConfig(kind="null"), None)
    with pytest.raises(
        ConfigError, match=r"vol0: backend.user: set group in the config's \[daemon\]"
    ) as raised:
        check_can_run("vol0", config, None)
    assert raised.value.status == STATUS_USAGE
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ConfigError, match="only a daemon that runs as root can run a backend as nobody"):
        check_can_run("vol0", config, GROUP)


def attach_as(user: int, backend: BackendConfig | None, workers: Account | None = None) -> None:
    """What a device with this backend and its workers' account says to a process of the user that would serve it."""

    async def run() -> None:
        device = fake_device(DeviceConfig(name="vol0", backend=backend))
        device.parts.backend.account = workers
        await device.parts.backend.check_user(user, device.parts.context.runner)

    asyncio.run(run())


def test_a_device_whose_backend_has_a_user_is_served_by_no_other() -> None:
    config = BackendConfig(kind="null", user=NOBODY)
    for user in (0, os.geteuid(), 65534):
        attach_as(user, config)
    for anybody in (None, BackendConfig(kind="null")):
        attach_as(4711, anybody)
    with pytest.raises(
        AttachRefused, match="vol0: user 4711 may not serve it: the daemon runs its backend as user nobody"
    ):
        attach_as(4711, config)
    with pytest.raises(AttachRefused, match="vol0: no such user: no-such-user; create it with"):
        attach_as(4711, BackendConfig(kind="null", user="no-such-user"))


def test_an_attach_of_another_user_changes_nothing_at_that_device() -> None:
    async def run() -> None:
        device = fake_device(DeviceConfig(name="vol", backend=BackendConfig(kind="null", user=NOBODY)))
        device.parts.resources.team = team = FakeTeam()
        session = FakeSession("null")
        with pytest.raises(AttachRefused, match=f"user {session.uid} may not serve it"):
            await device.attach(session)
        assert device.session is None and team.heard == []

    asyncio.run(run())


@pytest.fixture
def hung_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that knows the machine's users and does not answer; this process must not ask it at all."""
    ours = os.getpid()

    def hang(_user: object) -> NoReturn:
        assert os.getpid() != ours, "asked for a user on the loop"
        while True:
            signal.pause()

    monkeypatch.setattr(pwd, "getpwnam", hang)


@pytest.mark.usefixtures("hung_users")
def test_a_service_of_users_that_hangs_keeps_that_device_s_attach_waiting_alone() -> None:
    async def run() -> None:
        owned = fake_device(DeviceConfig(name="vol0", backend=BackendConfig(kind="null", user=NOBODY)))
        runner = owned.parts.context.runner
        waiting = [
            asyncio.create_task(owned.parts.backend.check_user(4711, runner)) for _ in range(LOOKS_MAX)
        ]
        try:
            await turn()
            # No more processes than that, whatever a user tries.
            with pytest.raises(ControlFailed, match="asking for user nobody"):
                await owned.parts.backend.check_user(4711, runner)
            # What the device itself looks at is not among them.
            assert await runner.look("vol0", "vol0: a look", lambda: 7, int) == 7
            assert not any(each.done() for each in waiting)
        finally:
            for each in waiting:
                each.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    asyncio.run(run())


@needs_root
@pytest.mark.usefixtures("hung_users")
def test_a_start_asks_for_the_user_in_the_new_process(place: Path) -> None:
    async def run() -> None:
        backend = BackendConfig(kind="null", user=NOBODY, cwd="/")
        process = BackendProcess("vol0", backend, place, lambda _fd: None, None, GROUP)
        process.start()
        assert process.child.exit_status is None
        process.child.send(signal.SIGKILL)
        await asyncio.wait_for(process.child.wait(), DEADLINE_S)
        assert process.child.exit_status == 128 + signal.SIGKILL

    asyncio.run(run())


def problems_of(backend: dict[str, object], place: Path) -> list[str]:
    problems: list[Problem] = []
    check_device({"name": "vol0", "backend": {"kind": "null", **backend}}, (), problems, place)
    return [f"{'.'.join(map(str, path))}: {message}" for path, message in problems]


def test_the_config_s_mistakes_about_a_user_are_one_line_each(tmp_path: Path) -> None:
    assert problems_of({"user": NOBODY}, tmp_path) == []
    assert problems_of({"user": "no-such-user"}, tmp_path) == [
        "backend.user: no such user: no-such-user; create it with: useradd --system no-such-user"
    ]
    assert problems_of({"user": 7}, tmp_path) == [
        "backend.user: expected a name, or a number in quotes, got 7"
    ]
    assert problems_of({"group": "root"}, tmp_path) == [
        "backend.group: is the group of another user: set user as well"
    ]
    assert problems_of({"user": NOBODY, "group": "no-such-group"}, tmp_path) == [
        "backend.group: no such group: no-such-group; create it with: groupadd --system no-such-group"
    ]


def test_a_config_file_without_a_group_is_refused_if_a_backend_has_a_user(tmp_path: Path) -> None:
    file = tmp_path / "ublkpool.toml"
    file.write_text('[[device]]\nname = "vol0"\n[device.backend]\nkind = "null"\nuser = "nobody"\n')
    with pytest.raises(ConfigError, match=r'device "vol0": backend.user: needs group in \[daemon\]'):
        load_config(file)
    file.write_text(f'[daemon]\ngroup = "root"\n{file.read_text()}')
    (device,) = load_config(file).devices
    assert device.backend is not None
    assert (device.backend.user, device.backend.group) == (NOBODY, None)
    # A record of a device that uses neither can be read by an earlier version.
    assert b"user" not in msgspec.json.encode(BackendConfig(kind="null"))


def test_a_name_that_no_user_can_have_is_refused_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "ublkpool.toml"
    file.write_text('[[device]]\nname = "vol0"\n[device.backend]\nkind = "null"\nuser = "a\\u0000b"\n')
    with pytest.raises(ConfigError, match=r'device "vol0": backend.user: no such user'):
        load_config(file)


@needs_root
def test_a_backend_whose_user_is_gone_says_so_and_is_started_once_there_is_one(tmp_path: Path) -> None:
    async def run() -> None:
        gone = BackendConfig(kind="null", user="no-such-user", cwd="/")
        process = BackendProcess("vol0", gone, tmp_path, lambda _fd: None, None, GROUP)
        process.start()
        await asyncio.wait_for(process.child.wait(), DEADLINE_S)
        assert process.child.exit_status == STATUS_USAGE
        assert "cannot start it: backend.user: no such user: no-such-user; create it" in process.obituary()
        process.config = msgspec.structs.replace(gone, user=None)
        process.start()
        process.child.send(signal.SIGKILL)
        await asyncio.wait_for(process.child.wait(), DEADLINE_S)

    asyncio.run(run())


def test_a_user_cannot_be_set_as_an_option() -> None:
    config = DeviceConfig(name="vol0", backend=BackendConfig(kind="null"))
    with pytest.raises(ConfigError, match=r"backend.user: is no option of a backend"):
        changed(config, {"backend.user": NOBODY})


def test_a_backend_for_which_its_daemon_set_the_flag_does_not_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdk_process._libc, "prctl", lambda *_: -1)
    assert sdk_process.set_io_flusher() is not None
    monkeypatch.setenv(sdk_process.IO_FLUSHER_SET, "1")
    assert sdk_process.set_io_flusher() is None


def test_no_backend_attaches_as_the_workers_user() -> None:
    workers = Account("ublkpool-worker", 4711, 4711, ())
    for account in (None, Account("root", 0, 0, ()), workers):
        for user in (0, 4712):
            attach_as(user, None, account)
    with pytest.raises(
        AttachRefused, match=r"device vol0: user ublkpool-worker is the workers' own.*another user"
    ):
        attach_as(4711, None, workers)
