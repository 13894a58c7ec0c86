"""What the tests of the screen share: a session with a minute of readings."""

from collections.abc import Sequence
from functools import cache

import pytest
from hypothesis import HealthCheck, settings

from support.fakes.top_readings import reading
from ublkpool.daemon.cli.top.reading import Reading
from ublkpool.daemon.cli.top.session import Session

MINUTE = 62
# On a busy machine hypothesis would report a slow example as a failure.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@cache
def _minute() -> Sequence[Reading]:
    return reading(MINUTE)


@pytest.fixture
def minute() -> Sequence[Reading]:
    """A minute of readings; they are never changed."""
    return _minute()


@pytest.fixture
def session(minute: Sequence[Reading]) -> Session:
    """A session that has shown the minute."""
    made = Session("/run/ublkpool")
    for each in minute:
        made.take(each)
    return made
