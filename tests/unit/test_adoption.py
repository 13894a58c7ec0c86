"""Going on with what an earlier daemon left of a device: workers and backend are made to agree."""

import asyncio
from collections.abc import Sequence

import msgspec
import pytest

from support.fakes.device_parts import FakeKernel, FakeParts, FakeSession, FakeTeam, fake_context
from ublkpool.daemon.backends.session import Session
from ublkpool.daemon.device import adoption
from ublkpool.daemon.device.records import Record
from ublkpool.daemon.device.resources import DeviceResources
from ublkpool.daemon.device.succession import AdoptedDevice
from ublkpool.daemon.device.team import Team
from ublkpool.daemon.processes.left_behind import Process
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.workers.messages import Standing
from ublkpool.workers.record_gate import RecordGate

TOKEN = b"\x01token"
BACKEND, BROKER = Process("backend", 11, 1), Process("broker", 12, 1)
RECORD = Record(config=DeviceConfig(name="vol"), device_number=3, segments=5, processes=(BACKEND, BROKER))


class LeftTeam(FakeTeam):
    """Workers that know these tokens."""

    def __init__(self, tokens: Sequence[str], has_let_go: bool = False) -> None:
        super().__init__()
        self._tokens, self._has_let_go = tokens, has_let_go

    async def report(self) -> list[Standing]:
        return [Standing(True, token, has_let_go=self._has_let_go) for token in self._tokens]

    async def hold(self, on: bool, gate: RecordGate | None = None) -> None:
        assert gate is None, "what is drained is so for good"
        self.heard.append(f"hold {on}")


class Scene:
    """What became of a backend that these workers know by these tokens; `is_held` if its connection was held."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tokens: Sequence[str], is_held: bool) -> None:
        self._monkeypatch, self._tokens, self._is_held = monkeypatch, tokens, is_held
        self.has_let_go = False
        self.steps: list[str] = []
        self.pool_users: list[int] = []
        monkeypatch.setattr(adoption, "end_left", self._end_left)
        monkeypatch.setattr(adoption, "AdoptedDevice", self)
        monkeypatch.setattr(DeviceResources, "adopt", self._adopt)

    async def of(self, record: Record, *_: object) -> AdoptedDevice:
        """Takes the place of `AdoptedDevice.of`."""
        session = FakeSession(token=TOKEN) if self._is_held else None

        class Adopted(AdoptedDevice):
            def session(self) -> Session | None:
                return session

        return Adopted(FakeKernel(), (), record, {})

    async def _adopt(self, _adopted: object, _disk: object) -> Team:
        self.team = LeftTeam(self._tokens, self.has_let_go)
        return self.team

    async def _end_left(self, _records: object, spare: Sequence[Process]) -> None:
        self.steps.append(f"end all but {[each.role for each in spare]}")

    async def play(self, record: Record = RECORD) -> FakeParts:
        parts = FakeParts(RECORD.config, fake_context())
        self._monkeypatch.setattr(parts.resources.pool, "had_by", self.pool_users.append)
        if record.drained:
            parts.hold("drained")
        await adoption.go_on(parts, record, {})
        for _ in range(5):
            await asyncio.sleep(0)
        self.steps += self.team.heard
        if isinstance(session := parts.backend.session, FakeSession) and session.was_cut_off:
            self.steps.append("cut off")
        return parts


@pytest.mark.parametrize(
    ("tokens", "is_held", "steps"),
    [
        ([TOKEN.hex()] * 2, True, ["hold False"]),
        ([TOKEN.hex(), ""], True, ["hold False", "cut off"]),
        (["", ""], False, ["hold False"]),
        ([TOKEN.hex(), ""], False, ["end all but ['broker']", "lost", "hold False"]),
    ],
    ids=["all workers know it", "one does not", "no backend", "one knows a backend that was not held"],
)
def test_workers_and_backend_are_made_to_agree(
    monkeypatch: pytest.MonkeyPatch, tokens: Sequence[str], is_held: bool, steps: list[str]
) -> None:
    scene = Scene(monkeypatch, tokens, is_held)
    asyncio.run(scene.play())
    assert scene.steps == steps
    assert scene.pool_users == ([33] if is_held else []), (
        "the pool's user is known only of an attached backend"
    )


def test_no_segment_number_is_given_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = asyncio.run(Scene(monkeypatch, [""], False).play())
    assert parts.backend.segments == RECORD.segments


@pytest.mark.parametrize("is_open", [False, True])
@pytest.mark.parametrize("has_let_go", [False, True])
def test_a_device_whose_requests_went_on_before_its_drain_was_complete_is_not_drained(
    monkeypatch: pytest.MonkeyPatch, is_open: bool, has_let_go: bool
) -> None:
    scene = Scene(monkeypatch, ["", ""], False)
    scene.has_let_go = has_let_go
    record = msgspec.structs.replace(RECORD, drained=True, drain_is_open=is_open)
    parts = asyncio.run(scene.play(record))
    goes_on = is_open and has_let_go
    assert parts.drain == ("" if goes_on else "drained")
    assert scene.steps == [f"hold {not goes_on}"]
    assert parts.backend.may_attach == goes_on
