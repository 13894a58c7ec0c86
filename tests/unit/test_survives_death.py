"""A backend whose data ends with its process: what the SDK tells of it, and that its device fails and stays failed."""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from support.fakes.device_parts import (
    DISK,
    SIZE_BYTES,
    FakeKernel,
    FakeSession,
    FakeTeam,
    fake_device,
    turn,
)
from support.fakes.plain_backend import Plain
from support.fakes.worker import BackendThread, FakeWorker, finish, serving, spawn
from ublkpool.bufpool import wire
from ublkpool.bufpool.errors import AttachRefused, StoreTaken
from ublkpool.bufpool.sdk.backend import Backend, Hint, Properties
from ublkpool.bufpool.sdk.backend import Device as AttachedDevice
from ublkpool.daemon.backends.managed_backend import ManagedBackend
from ublkpool.daemon.device import adoption, teardown
from ublkpool.daemon.device.device import Device
from ublkpool.daemon.device.parts import DeviceParts
from ublkpool.daemon.device.records import Record, Served
from ublkpool.daemon.device.team import Team
from ublkpool.daemon.kernel.block_device import BlockDevice
from ublkpool.daemon.settings.config import DeviceConfig

DEADLINE_S = 60
REASON = "its backend dict has ended, and the data of the device with it (survives_death = False)"
ATTACH = wire.Attach(v=1, device="vol", kind="dict", survives_death=False)


def in_loop(test: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await asyncio.wait_for(test(), DEADLINE_S)

    asyncio.run(run())


class Dying(FakeTeam):
    """Workers that can be killed."""

    async def kill(self) -> None:
        self.heard.append("killed")


def mortal() -> FakeSession:
    """A backend that declares that its data ends with it."""
    session = FakeSession("dict")
    session.attach = ATTACH
    return session


def live_device(team: FakeTeam, **config: object) -> Device:
    device = fake_device(DeviceConfig(name="vol", size_bytes=SIZE_BYTES, **config))  # type: ignore[arg-type]
    device.parts.resources.team = team
    device.parts.life.state = "live"
    return device


@pytest.fixture
def torn_down(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The state of each device whose kernel device was removed."""
    states: list[str] = []

    async def tear_down(parts: DeviceParts, keep: bool) -> None:
        states.append(parts.life.state)
        parts.left = None

    monkeypatch.setattr(teardown, "tear_down", tear_down)
    return states


@pytest.mark.parametrize("recovery", ["reissue", "abort", "fail"])
def test_the_device_fails_with_its_backend_whatever_the_recovery(
    torn_down: list[str], caplog: pytest.LogCaptureFixture, recovery: str
) -> None:
    async def run() -> None:
        team = Dying()
        device = live_device(team, recovery=recovery)
        session = mortal()
        await device.attach(session)
        session.dies()
        await turn()
        assert (device.state, device.reason) == ("failed", REASON)
        assert team.heard == ["expect dict", "lost", "killed"]
        assert torn_down == ["failed"]
        with pytest.raises(AttachRefused, match="the data of the device with it"):
            await device.attach(mortal())

    with caplog.at_level(logging.ERROR, "ublkpool"):
        in_loop(run)
    assert [each.getMessage() for each in caplog.records] == [f"vol: {REASON}"]


def test_a_successor_that_waits_for_the_farewell_is_refused(torn_down: list[str]) -> None:
    async def run() -> None:
        device = live_device(Dying())
        session = mortal()
        await device.attach(session)
        session.leaving = True
        waiting = asyncio.ensure_future(device.attach(FakeSession("dict")))
        await turn()
        session.dies()
        with pytest.raises(AttachRefused, match="the data of the device with it"):
            await waiting

    in_loop(run)


def test_the_daemons_own_backend_is_not_started_again(torn_down: list[str]) -> None:
    steps: list[str] = []

    class Managed(ManagedBackend):
        def __init__(self) -> None:
            """It runs already."""

        def serves(self) -> None:
            """It has attached."""

        def let_end(self) -> None:
            steps.append("not started again")

        async def end(self) -> None:
            steps.append("ended")

    async def run() -> None:
        device = live_device(Dying())
        device.parts.managed = Managed()
        session = mortal()
        await device.attach(session)
        session.dies()
        await turn()
        assert device.state == "failed"

    in_loop(run)
    assert steps == ["not started again", "ended"]


def test_an_upgrade_leaves_the_backend_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []

    class Managed(ManagedBackend):
        def __init__(self) -> None:
            """It runs already."""

        pid = 1

        def serves(self) -> None:
            """It has attached."""

        async def replace(self) -> None:
            ended.append("ended")

    async def run(session: FakeSession) -> None:
        device = live_device(FakeTeam())
        device.parts.managed = Managed()
        await device.attach(session)

        async def next_epoch() -> str:
            return ""

        async def retire(_team: Team, _name: str) -> None:
            """The workers end."""

        monkeypatch.setattr(device, "_try_next_epoch", next_epoch)
        monkeypatch.setattr("ublkpool.daemon.device.device.retire", retire)
        await device.renew()

    in_loop(lambda: run(mortal()))
    assert not ended
    in_loop(lambda: run(FakeSession("file")))
    assert ended == ["ended"]


def test_a_backend_that_served_no_client_yet_has_lost_nothing() -> None:
    async def run() -> None:
        device = live_device(FakeTeam())
        device.parts.life.state = "waiting"
        first = mortal()
        await device.attach(first)
        first.dies()
        await turn()
        assert (device.state, device.session) == ("waiting", None)
        await device.attach(mortal())

    in_loop(run)


def test_a_backend_that_ends_while_the_disk_starts_may_have_lost_data(torn_down: list[str]) -> None:
    async def run() -> None:
        device = live_device(Dying())
        device.parts.life.state = "waiting"
        session = mortal()
        await device.attach(session)
        device.parts.binding.starting()
        session.dies()
        await turn()
        assert device.state == "failed"

    in_loop(run)


def test_the_end_of_the_device_is_no_failure() -> None:
    async def run() -> None:
        device = live_device(FakeTeam())
        session = mortal()
        await device.attach(session)
        device.parts.life.is_stopping = True
        session.dies()
        await turn()
        assert device.reason == ""

    in_loop(run)


def record(**changes: object) -> Record:
    served = Served(ATTACH, "01" * 16, 0)
    made = Record(
        config=DeviceConfig(name="vol"), device_number=3, disk=DISK, epoch=7, served=served, live=True
    )
    return msgspec.structs.replace(made, **changes)


@pytest.mark.parametrize(
    ("left", "reason"),
    [(record(), REASON), (record(live=False, served=None, data_lost="gone"), "gone")],
    ids=["the backend was served", "the device was failing"],
)
def test_the_next_daemon_does_not_recover_a_device_without_its_data(
    monkeypatch: pytest.MonkeyPatch, torn_down: list[str], left: Record, reason: str
) -> None:
    class Found(BlockDevice):
        @classmethod
        async def find(cls, *_: object) -> BlockDevice:
            return FakeKernel()

    async def run() -> None:
        device = fake_device()
        monkeypatch.setattr(adoption, "BlockDevice", Found)
        device.await_takeover(left)
        assert await device.recover_left(left, {})
        assert (device.state, device.reason) == ("failed", reason)
        assert torn_down == ["failed"]

    in_loop(run)


@pytest.mark.parametrize("is_alive", [True, False])
def test_the_next_daemon_goes_on_with_the_backend_and_watches_it(
    monkeypatch: pytest.MonkeyPatch, torn_down: list[str], is_alive: bool
) -> None:
    async def run() -> None:
        device, session, team = fake_device(), mortal(), Dying()

        async def go_on(parts: DeviceParts, *_: object) -> Team:
            parts.resources.team = team
            parts.backend.session = session if is_alive else None
            return team

        async def learn(*_: object) -> None:
            """The store is known."""

        monkeypatch.setattr(adoption, "go_on", go_on)
        monkeypatch.setattr(adoption, "learn", learn)
        device.await_takeover(record())
        await device.go_on(record(), {})
        if is_alive:
            assert device.state == "live"
            session.dies()
            await turn()
        assert (device.state, device.reason) == ("failed", REASON)

    in_loop(run)


def test_a_record_says_what_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        device = fake_device()
        saved: list[Record] = []
        # The fake's `save`, which puts nothing on record.
        del device.parts.save
        monkeypatch.setattr(device.parts.context.records, "save", saved.append)
        device.parts.resources.kernel = FakeKernel()
        device.parts.backend.data_lost = REASON
        device.parts.enter("failed")
        assert saved[-1].data_lost == REASON
        assert msgspec.json.decode(msgspec.json.encode(saved[-1]), type=Record) == saved[-1]

    in_loop(run)


# What the SDK tells


class Mortal(Plain):
    survives_death = False
    stores_data = False


def attach_of(run_dir: Path, backend: Backend, **described: object) -> wire.Attach:
    with FakeWorker(run_dir) as worker:
        worker.described = described
        with serving(worker, backend):
            assert worker.attach is not None
            return worker.attach


def test_a_daemon_that_knows_it_is_told(tmp_path: Path) -> None:
    attach = attach_of(tmp_path, Mortal(), knows_survival=True)
    assert (attach.survives_death, attach.stores_data) == (False, True)
    assert attach.identity is not None and attach.identity.ends_with_device
    assert attach_of(tmp_path, Plain(), knows_survival=True) == attach_of(tmp_path, Plain())


def test_a_check_is_told_that_no_data_is_stored(tmp_path: Path) -> None:
    attach = attach_of(tmp_path, Mortal(), knows_survival=True, is_check=True)
    assert (attach.survives_death, attach.stores_data) == (False, False)


def test_an_older_daemon_is_not_told_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    attach = attach_of(tmp_path, Mortal())
    assert attach.survives_death
    assert "survives_death" not in wire.encode_message(attach).decode()
    assert "this daemon would serve the device without it" in caplog.text


def test_a_module_of_functions_declares_it_by_a_name(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("survives_death = False\ndef get_size(): return 4096\ndef pread(buf, offset): pass\n")
    with FakeWorker(tmp_path) as worker:
        worker.described = {"knows_survival": True}
        process = spawn(tmp_path, file, {})
        assert not worker.accept().survives_death
        worker.detach()
        assert finish(process)[0] == 0


# A store that another client has taken over.


TAKEN = "pool/vol: another client has taken the image over"


class Locked(Plain):
    """Holds a lock in its cluster."""

    def open(self, hint: Hint) -> Properties:
        """See `Backend.open`."""
        self.hint = hint
        return msgspec.structs.replace(super().open(hint), owner="10.0.0.1:0/7")


@pytest.mark.parametrize("former", ["", "10.0.0.1:0/6"])
def test_a_backend_hears_the_former_owner_and_tells_its_own(tmp_path: Path, former: str) -> None:
    backend = Locked()
    attach = attach_of(tmp_path, backend, former_owner=former, takes_over=True)
    assert attach.owner == "10.0.0.1:0/7"
    assert (backend.hint.former_owner, backend.hint.takes_over) == (former, True)


def test_a_daemon_that_does_not_know_owners_is_not_told_one(tmp_path: Path) -> None:
    attach = attach_of(tmp_path, Locked())
    assert "owner" not in wire.encode_message(attach).decode()


def test_a_device_whose_store_was_taken_over_fails_and_takes_no_successor(
    torn_down: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        device = live_device(Dying())
        session = FakeSession("rbd")
        session.excluded = TAKEN
        await device.attach(session)
        session.dies()
        await turn()
        assert (device.state, device.reason, torn_down) == ("failed", TAKEN, ["failed"])
        with pytest.raises(AttachRefused, match="taken the image over"):
            await device.attach(FakeSession("rbd"))

    with caplog.at_level(logging.ERROR, "ublkpool"):
        in_loop(run)


def test_the_former_owner_is_told_only_when_its_process_has_ended() -> None:
    async def run() -> None:
        device = live_device(Dying())
        session = FakeSession("rbd")
        session.attach = wire.Attach(v=1, device="vol", kind="rbd", owner="10.0.0.1:0/7")
        assert device.describe().former_owner == ""
        await device.attach(session)
        assert device.parts.binding.owner == "10.0.0.1:0/7"
        assert device.describe().former_owner == "", "its process lives"
        session.dies()
        await turn()
        assert device.describe().former_owner == "10.0.0.1:0/7"

    in_loop(run)


def test_a_backend_whose_store_was_taken_says_so_before_it_ends(tmp_path: Path) -> None:
    class Taken(Locked):
        def started(self, device: AttachedDevice) -> None:
            self.news = os.eventfd(1, os.EFD_CLOEXEC)
            device.watch(self.news, self._raise)

        def _raise(self) -> None:
            raise StoreTaken(TAKEN)

        def close(self) -> None:
            os.close(self.news)

    with FakeWorker(tmp_path) as worker:
        worker.described = {"former_owner": ""}
        thread = BackendThread(Taken(), worker.run_dir)
        worker.accept()
        assert worker.connection is not None
        said = wire.decode_session_message(worker.connection.recv(wire.ATTACH_MESSAGE_BYTES_MAX))
        assert said == wire.Excluded(reason=TAKEN)
        with pytest.raises(StoreTaken, match="taken the image over"):
            thread.join()
