"""A device's order of attach, farewell and adoption, with its workers, backends and kernel made up."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from support.fakes.states import FakeStates
from ublkpool.bufpool import wire
from ublkpool.bufpool.errors import AttachRefused, PoolError
from ublkpool.daemon.admin.measure import device_stats
from ublkpool.daemon.backends.session import Session
from ublkpool.daemon.device import adoption
from ublkpool.daemon.device import resources as resources
from ublkpool.daemon.device.context import DaemonContext
from ublkpool.daemon.device.device import IO_TIMEOUT_MS, Device
from ublkpool.daemon.device.records import Record
from ublkpool.daemon.device.recovery import RESTARTS_MAX
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.settings.config import DeviceConfig

DEADLINE_S = 20
SIZE_BYTES = 1 << 20


def in_loop(test: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await asyncio.wait_for(test(), DEADLINE_S)

    asyncio.run(run())


class FakeHolder:
    """Keeps nothing."""

    def hold(self, _name: str, _fd: int) -> None:
        """See the class."""

    def drop(self, _name: str) -> None:
        """See the class."""


def new_device(**config: Any) -> Device:
    context = SimpleNamespace(
        run_dir=Path("/nonexistent"),
        runner=None,
        holder=FakeHolder(),
        records=None,
        states=FakeStates(),
        boot_id="this boot",
    )
    device = Device(DeviceConfig(name="vol", size_bytes=SIZE_BYTES, **config), cast(DaemonContext, context))
    device.save = lambda: None  # type: ignore[method-assign]
    return device


class FakeSession:
    """An attached backend that goes when it is told to."""

    def __init__(self, kind: str) -> None:
        self.attach = wire.Attach(v=1, device="vol", kind=kind)
        self.pid, self.uid, self.segment = 1, 0, 0
        self._gone = asyncio.get_running_loop().create_future()
        self.is_leaving = False

    @property
    def is_gone(self) -> bool:
        return self._gone.done()

    async def gone(self) -> None:
        await asyncio.shield(self._gone)

    def dies(self) -> None:
        self._gone.set_result(None)

    def say(self, *_: object) -> None:
        """Nobody listens."""

    def entrust(self, *_: object) -> None:
        """It is given nothing."""

    def close(self) -> None:
        """Nothing is open."""

    def fileno(self) -> int:
        return -1

    segment_fd = None


class FakeTeam:
    """Workers that note whom they are told to expect, and who is gone."""

    def __init__(self, dies_at_once: str) -> None:
        self.heard: list[str] = []
        self.workers: list[Any] = []
        self.epoch = 1
        self.plan = SimpleNamespace(
            descriptors=lambda: nullcontext([]),
            kernel=SimpleNamespace(node="/dev/null", set_io_timeout=self._set_io_timeout),
        )
        self._dies_at_once = dies_at_once

    async def _set_io_timeout(self, _timeout_ms: int) -> None:
        """There is no disk."""

    async def expect(self, session: FakeSession, fence: bool) -> None:
        await asyncio.sleep(0)
        self.heard.append(f"expect {session.attach.kind}")
        if session.attach.kind == self._dies_at_once:
            session.dies()

    async def lost(self) -> None:
        await asyncio.sleep(0)
        self.heard.append("lost")

    def attached(self, _session: object) -> None:
        """What a backend is told does not matter here."""

    def unlinked(self) -> list[int]:
        return []


def test_the_farewell_of_a_backend_that_died_at_once_is_not_taken_for_its_successors() -> None:
    """Both wait while the device is recovered: the second must not be introduced before the first is taken leave of."""

    async def run() -> None:
        device, team = new_device(), FakeTeam(dies_at_once="first")
        device._resources.team = cast(Any, team)
        sessions = [FakeSession("first"), FakeSession("second")]
        async with device._life.turn:
            tasks = [asyncio.ensure_future(device.attach(cast(Session, each))) for each in sessions]
            for _ in range(5):
                await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        assert team.heard == ["expect first", "lost", "expect second"]
        assert device.session is cast(Any, sessions[1])

    in_loop(run)


class FakeManaged:
    """A backend that the daemon runs, with what it has to say."""

    pid = 77
    trouble = ""

    def serves(self) -> None:
        self.trouble = ""


def test_a_device_without_its_backend_says_why_until_one_is_attached() -> None:
    async def run() -> None:
        device, team, managed = new_device(), FakeTeam(dies_at_once="nobody"), FakeManaged()
        device._resources.team, device._managed = cast(Any, team), cast(Any, managed)
        device._life.enter("live")
        assert device.status().reason == "no backend is attached, requests wait"
        managed.trouble = "backend file ended: exit status 2: path=/x: has 4096 bytes"
        assert device.status().reason == f"no backend is attached, requests wait: {managed.trouble}"
        assert device_stats(device).reason == device.status().reason
        first = FakeSession("file")
        await device.attach(cast(Session, first))
        assert (device.status().reason, device_stats(device).reason) == ("", "")
        first.dies()
        await first.gone()
        while device.session is not None:
            await asyncio.sleep(0)
        assert device.status().reason == "no backend is attached, requests wait", "nothing old is said"

    in_loop(run)


def test_why_the_last_backend_was_refused_is_said_until_one_is_taken() -> None:
    async def run() -> None:
        device, team = new_device(), FakeTeam(dies_at_once="nobody")
        device._resources.team = cast(Any, team)
        device.note_refusal("backend file, process 9, was refused: too small")
        assert device.status().reason == "backend file, process 9, was refused: too small"
        device._life.enter("live")
        assert device.status().reason.endswith(
            "requests wait: backend file, process 9, was refused: too small"
        )
        await device.attach(cast(Session, FakeSession("file")))
        device.note_refusal("backend file, process 10, was refused: there is one already")
        assert device.status().reason == ""

    in_loop(run)


def test_a_device_says_why_it_is_recovered_until_it_is_live() -> None:
    async def run() -> None:
        device, reasons = new_device(), []

        async def recover() -> None:
            reasons.append(device.status().reason)
            if len(reasons) == 1:
                raise DaemonError("the pool broker is gone")
            device._now_live(cast(Any, FakeTeam(dies_at_once="nobody")))

        device._recover = recover  # type: ignore[method-assign]
        device._attachment.session = cast(Any, FakeSession("file"))
        device._life.enter("live")
        await device._recover_while_worth_it("vol: queue 0: its worker ended: killed by SIGKILL")
        assert reasons == ["queue 0: its worker ended: killed by SIGKILL", "the pool broker is gone"]
        assert device.status().reason == ""

    in_loop(run)


@pytest.mark.parametrize("is_started", [False, True])
def test_a_worker_that_dies_in_the_partition_scan_is_recovered_and_the_start_goes_on(
    is_started: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """START_DEV has returned and the disk has not been opened yet; before that there is nothing to recover."""

    states: list[str] = []

    async def run() -> None:
        device, dead = new_device(), FakeTeam(dies_at_once="")
        dead.plan.kernel.is_started = is_started
        device._resources.team = cast(Any, dead)
        device.on_change(lambda: states.append(device.state))

        async def recover(_session: object) -> Any:
            device._resources.team = cast(Any, FakeTeam(dies_at_once=""))
            return device._resources.team

        async def no_fail(_reason: str) -> None:
            device._life.enter("failed")

        monkeypatch.setattr(device._resources, "recover", recover)
        monkeypatch.setattr(device, "_fail", no_fail)
        await device._recover_or_fail(cast(Any, dead), "queue 0: its worker ended")
        await device._end_start("")

    in_loop(run)
    assert states == (["recovering", "waiting", "live"] if is_started else ["failed"])


def test_a_device_that_fails_ends_its_backend_before_it_waits_for_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """STOP_DEV may wait for a dead worker's requests: nothing is to serve or to be started meanwhile."""

    async def run() -> None:
        device, steps = new_device(), []

        def note(step: str) -> Callable[..., Awaitable[None]]:
            async def noted(*_: object) -> None:
                steps.append(step)

            return noted

        device._resources.team = cast(Any, SimpleNamespace(kill=note("workers killed")))
        device._managed = cast(
            Any, SimpleNamespace(let_end=lambda: steps.append("not started again"), end=note("backend ended"))
        )
        monkeypatch.setattr(device._attachment, "end", note("backend told to leave"))
        monkeypatch.setattr(device, "_tear_down_logged", note("kernel"))
        await device._fail("queue 0: its worker ended")
        assert steps == [
            "workers killed",
            "not started again",
            "backend told to leave",
            "backend ended",
            "kernel",
        ]

    in_loop(run)


@pytest.mark.parametrize("recovery", ["reissue", "none"])
def test_the_driver_is_to_notice_a_dead_worker_soon_whatever_the_recovery(recovery: str) -> None:
    """Older drivers notice the end of a worker that holds all of its tags by the block layer's timer alone."""

    async def run() -> None:
        device, team = new_device(recovery=recovery), FakeTeam(dies_at_once="")
        set_ms: list[int] = []

        async def set_io_timeout(timeout_ms: int) -> None:
            set_ms.append(timeout_ms)

        team.plan.kernel.set_io_timeout = set_io_timeout
        device._resources.team = cast(Any, team)
        await device._end_start("")
        while not set_ms:
            await asyncio.sleep(0)
        assert set_ms == [IO_TIMEOUT_MS]

    in_loop(run)


def test_the_successor_of_a_backend_that_is_leaving_waits_for_its_death() -> None:
    """It has closed its connection and may still touch what it was given."""

    async def run() -> None:
        device, team = new_device(), FakeTeam(dies_at_once="nobody")
        device._resources.team = cast(Any, team)
        first, second = FakeSession("first"), FakeSession("second")
        await device.attach(cast(Session, first))
        with pytest.raises(AttachRefused, match=r"has a backend already \(first, process 1\)"):
            await device.attach(cast(Session, second))
        first.is_leaving = True
        waiting = asyncio.ensure_future(device.attach(cast(Session, second)))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not waiting.done() and team.heard == ["expect first"]
        first.dies()
        await waiting
        assert team.heard == ["expect first", "lost", "expect second"]

    in_loop(run)


def test_workers_that_answer_take_no_backend() -> None:
    async def run() -> None:
        device = new_device(answers="worker")
        with pytest.raises(AttachRefused, match=r"^device vol: its workers answer: add it without --answers"):
            await device.attach(cast(Session, FakeSession("null")))

    in_loop(run)


def test_a_device_whose_workers_answer_goes_live_with_nobody_attached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It promises the kernel the disk that was configured, and what costs nothing to be refused."""
    built: list[wire.Attach] = []

    async def build(attach: wire.Attach) -> object:
        built.append(attach)
        return object()

    async def run() -> None:
        device = new_device(answers="worker")

        async def go_live(_team: object) -> None:
            device._life.enter("live")

        monkeypatch.setattr(device._resources, "build", build)
        monkeypatch.setattr(device, "_go_live", go_live)
        await device.run()
        assert device.state == "live" and device.session is None
        assert device.status().answers == "worker"

    in_loop(run)
    assert built[0].size_bytes == 0 and built[0].discard_max_bytes > 0 and not built[0].volatile_cache


def test_workers_that_answer_and_cannot_start_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    async def build(_attach: wire.Attach) -> object:
        raise PoolError("/dev/shm is full")

    async def run() -> None:
        device = new_device(answers="worker")

        async def tear_down(keep: bool) -> None:
            assert keep

        monkeypatch.setattr(device._resources, "build", build)
        monkeypatch.setattr(device, "_tear_down", tear_down)
        with pytest.raises(DaemonError, match=r"^vol: /dev/shm is full$"):
            await device.run()
        assert device.state == "failed"

    in_loop(run)


class Adoption:
    """A device that an earlier daemon left, and takers-over that fail so many times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
        self.attempts: list[str] = []
        self._failures = failures
        self.device = new_device()
        self.kernel = SimpleNamespace(is_started=True, number=3, set_io_timeout=lambda _: None)
        self.team = FakeTeam(dies_at_once="nobody")
        monkeypatch.setattr(adoption, "RETRY_PAUSE_S", 0.0)
        monkeypatch.setattr(adoption, "BlockDevice", SimpleNamespace(find=self._find))
        monkeypatch.setattr(resources, "next_epoch", self._next_epoch)
        monkeypatch.setattr(resources, "recover", self._recover)
        monkeypatch.setattr(self.device._resources, "_make_pool", lambda _: object())
        monkeypatch.setattr(self.device, "_tear_down", self._tear_down)

    async def _find(self, *_: object) -> Any:
        return self.kernel

    async def _next_epoch(self, *_: object) -> Any:
        self.device._resources.team = cast(Any, self.team)
        return self._attempt("next epoch")

    async def _recover(self, *_: object) -> Any:
        return self._attempt("recover")

    def _attempt(self, how: str) -> Any:
        self.attempts.append(how)
        if len(self.attempts) <= self._failures:
            raise DaemonError("the pool broker is gone")
        return self.team

    async def _tear_down(self, keep: bool) -> None:
        self.device._resources.team = None

    async def kill(self) -> None:
        """Of the team's."""

    async def adopt(self) -> bool:
        self.team.kill = self.kill  # type: ignore[attr-defined]
        record = SimpleNamespace(
            config=self.device.config,
            device_number=3,
            device_mark=0,
            disk=None,
            epoch=7,
            segments=0,
            clients=None,
            served=None,
            going=False,
        )
        return await self.device.recover_left(cast(Record, record), {})


def test_an_adoption_in_which_somebody_dies_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        it = Adoption(monkeypatch, failures=2)
        assert await it.adopt()
        assert it.device.state == "live"
        assert it.attempts == ["next epoch", "recover", "recover"], (
            "the workers of a failed attempt are ended first"
        )

    in_loop(run)


def test_an_adoption_that_never_succeeds_ends_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        it = Adoption(monkeypatch, failures=100)
        assert await it.adopt()
        assert it.device.state == "failed" and "the pool broker is gone" in it.device.reason
        assert len(it.attempts) == RESTARTS_MAX

    in_loop(run)


def test_what_an_earlier_daemon_left_gets_no_new_store_before_it_is_known_which_it_had() -> None:
    async def test() -> None:
        device = new_device()
        assert device.describe().may_create
        device.await_takeover(Record(config=device.config, device_number=3))
        assert device.describe().may_create is False
        waiting = new_device()
        waiting.await_takeover(Record(config=waiting.config))
        assert waiting.describe().may_create

    in_loop(test)
