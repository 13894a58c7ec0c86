"""Going on with what an earlier daemon left of a device: workers and backend are brought to the same."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ublkpool.daemon.device import adoption
from ublkpool.daemon.device.adoption import Adoption
from ublkpool.daemon.device.records import Record
from ublkpool.daemon.processes.left_behind import Process
from ublkpool.daemon.settings.config import DeviceConfig

TOKEN = b"\x01token"
BACKEND, BROKER = Process("backend", 11, 1), Process("broker", 12, 1)
RECORD = Record(config=DeviceConfig(name="vol"), device_number=3, segments=5, processes=(BACKEND, BROKER))


class Scene:
    """A team whose workers know these tokens, and a backend's session if there is one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tokens: list[str], session: object | None) -> None:
        self.steps: list[str] = []
        self._tokens, self._session = tokens, session
        self.attachment = SimpleNamespace(
            session=None,
            segments=1,
            adopt=lambda *_: self.steps.append("adopt"),
            cut_off_soon=lambda: self.steps.append("cut off"),
        )
        self.pool_users: list[int] = []
        self.pool = SimpleNamespace(had_by=self.pool_users.append)
        monkeypatch.setattr(adoption, "end_left", self._end_left)

    async def _end_left(self, _records: object, spare: list[Process]) -> None:
        self.steps.append(f"end all but {[each.role for each in spare]}")

    async def adopt(self, _heir: object) -> Any:
        return self

    async def report(self) -> list[Any]:
        return [SimpleNamespace(token=token) for token in self._tokens]

    async def lost(self) -> None:
        self.steps.append("lost")

    def play(self) -> list[str]:
        adopted = SimpleNamespace(session=lambda: self._session)
        made = Adoption(RECORD, cast(Any, self), cast(Any, self.attachment))
        asyncio.run(made.go_on(cast(Any, adopted)))
        return self.steps


ALIVE = SimpleNamespace(token=TOKEN, uid=33)


@pytest.mark.parametrize(
    ("tokens", "session", "steps"),
    [
        ([TOKEN.hex()] * 2, ALIVE, ["adopt"]),
        ([TOKEN.hex(), ""], ALIVE, ["adopt", "cut off"]),
        (["", ""], None, []),
        ([TOKEN.hex(), ""], None, ["end all but ['broker']", "lost"]),
    ],
    ids=["all know it", "one does not", "nobody is there", "one knows somebody who is not there"],
)
def test_workers_and_backend_are_brought_to_the_same(
    monkeypatch: pytest.MonkeyPatch, tokens: list[str], session: object | None, steps: list[str]
) -> None:
    scene = Scene(monkeypatch, tokens, session)
    assert scene.play() == steps
    assert scene.pool_users == ([33] if session else []), "who has the pool is known only of who is attached"


def test_no_segments_number_is_given_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, [""], None)
    scene.play()
    assert scene.attachment.segments == RECORD.segments
