"""Fixtures that several unit tests share."""

import pytest

from support.fake_worker import FakeWorker


@pytest.fixture(params=["zeromq", "ring"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What fake workers offer to backends: a test that asks for it runs over both."""
    monkeypatch.setattr(FakeWorker, "transport", request.param)
    return str(request.param)
