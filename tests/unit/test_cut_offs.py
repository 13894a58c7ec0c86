"""Why backends were cut off: each reason that is told in words has a name, and there are only so many names."""

from pathlib import Path

from ublkpool.daemon.device.cut_offs import _WORDS, OTHER, CutOffs, name_of
from ublkpool.daemon.status import CUT_OFF_REASONS
from ublkpool.ublk.queue import VIOLATIONS

ROOT = Path(__file__).parents[2]


def test_each_violation_has_a_name_of_its_own() -> None:
    names = [name_of(f"{words} (kind 3, tag 1, result 0, segment 0, buffer 0)") for words in VIOLATIONS[1:]]
    assert names == list(CUT_OFF_REASONS[: len(names)])
    assert len(set(names)) == len(names)
    assert set(_WORDS.values()) | {OTHER} == set(CUT_OFF_REASONS)


def test_the_words_of_every_other_reason_are_those_that_the_daemon_says() -> None:
    places = ("daemon/backends/session.py", "daemon/device/recovery.py")
    code = "".join((ROOT / each).read_text() for each in places)
    for words in _WORDS:
        assert words in VIOLATIONS or words in code
    assert code.count(".blame(") == sum(words not in VIOLATIONS for words in _WORDS)


def test_counts_are_of_names_whatever_the_words_are() -> None:
    cut_offs = CutOffs()
    assert cut_offs.counts() == {}
    for number in range(100):
        cut_offs.note(f"something new {number}")
    cut_offs.note("no answer within io_timeout_s")
    cut_offs.note("backend cut off: process 5 has hung up on a queue and stays")
    assert cut_offs.counts() == {"other": 100, "silence": 1, "stays": 1}


def test_the_document_explains_each_reason() -> None:
    document = (ROOT / "docs" / "METRICS.md").read_text()
    rows = document.partition("| reason | the backend |")[2].splitlines()[2 : 2 + len(CUT_OFF_REASONS)]
    assert [row.split("`")[1] for row in rows] == list(CUT_OFF_REASONS)
