"""Whose lock a backend breaks, whom it waits for, and when it gives up."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen

import pytest

from ublkpool.backends.rbd.mark import MARK, ProcessMark
from ublkpool.backends.rbd.owner import LIVE_PATIENCE_S, Claim, check_not_served_elsewhere, served_by
from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk.backend import Hint

ME, BEFORE, OTHER = "10.0.0.1:0/9", "10.0.0.1:0/8", "10.0.0.2:0/5"


class FakeImage:
    """An image whose lock and watchers are in memory; `sleep` is the passing of time."""

    def __init__(self, owner: str = "", watchers: tuple[str, ...] = ()) -> None:
        self.owner, self.open_by = owner, [ME, *watchers]
        self.broken: list[str] = []
        self.now_s = 0.0
        self.ends_at_s: float | None = None
        self.errors: list[int] = []
        self.own_address = ME
        self.on_record: dict[str, str] = {}

    def lock_owners(self) -> list[str]:
        return [self.owner] if self.owner else []

    def watchers(self) -> list[str]:
        return self.open_by

    def acquire_lock(self) -> None:
        if self.errors:
            raise OSError(self.errors.pop(0), "lock")
        assert not self.owner or self.owner not in self.open_by, (
            "librbd would ask a living owner for its lock"
        )
        self.owner = ME

    def break_lock(self, owner: str) -> None:
        if owner != self.owner:
            raise OSError(errno.EBUSY, "lock")
        self.broken.append(owner)
        self.owner = ""

    def metadata(self, key: str) -> str:
        return self.on_record.get(key, "")

    def set_metadata(self, key: str, value: str) -> None:
        assert not self.owner or self.owner not in self.open_by, "a living owner's mark stays"
        self.on_record[key] = value

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        if self.ends_at_s is not None and self.now_s >= self.ends_at_s:
            self.open_by = [ME]


def take(image: FakeImage, former: str | None = "", takes_over: bool = False) -> str:
    hint = Hint("vol0", Path("/run"), former_owner=former, takes_over=takes_over)
    return Claim(image, "pool/img", hint, lambda: image.now_s, image.sleep).take()


def test_a_lock_that_is_free_is_taken() -> None:
    image = FakeImage()
    assert take(image) == ME
    assert (image.broken, image.now_s) == ([], 0)


def test_the_lock_of_the_owner_on_record_is_broken_at_once_though_the_cluster_counts_it_as_alive() -> None:
    image = FakeImage(BEFORE, watchers=(BEFORE,))
    assert take(image, former=BEFORE) == ME
    assert (image.broken, image.now_s) == ([BEFORE], 0)


@pytest.mark.parametrize("former", ["", None, BEFORE])
def test_another_living_owner_s_lock_is_not_broken_and_the_line_says_how(former: str | None) -> None:
    image = FakeImage(OTHER, watchers=(OTHER,))
    with pytest.raises(BackendError, match=rf"locked by {OTHER}.*ublkpool add vol0 \.\.\. --take-over"):
        take(image, former=former)
    assert (image.broken, image.owner) == ([], OTHER)
    assert image.now_s >= LIVE_PATIENCE_S


def test_another_owner_that_ends_meanwhile_is_followed() -> None:
    image = FakeImage(OTHER, watchers=(OTHER,))
    image.ends_at_s = 30
    assert take(image) == ME
    assert image.broken == [], "librbd breaks the lock of a dead client itself"


def test_an_operator_s_takeover_breaks_any_lock() -> None:
    image = FakeImage(OTHER, watchers=(OTHER,))
    assert take(image, takes_over=True) == ME
    assert image.broken == [OTHER]


def look(image: FakeImage, former: str | None = "", takes_over: bool = False) -> None:
    hint = Hint("vol0", Path("/run"), former_owner=former, takes_over=takes_over)
    Claim(image, "pool/img", hint, lambda: image.now_s, image.sleep).check()
    assert (image.broken, image.on_record, image.now_s) == ([], {}, 0), "a look changes nothing"


def test_a_look_finds_another_living_owner_and_no_other_reason_to_wait() -> None:
    image = FakeImage(OTHER, watchers=(OTHER,))
    with pytest.raises(BackendError, match=rf"locked by {OTHER}.*--take-over"):
        look(image, former=BEFORE)
    look(image, takes_over=True)
    look(FakeImage(BEFORE, watchers=(BEFORE,)), former=BEFORE)
    look(FakeImage(OTHER))
    look(FakeImage())


@pytest.mark.parametrize("moved", [errno.EROFS, errno.EBUSY])
def test_a_lock_that_another_client_takes_meanwhile_is_looked_at_again(moved: int) -> None:
    image = FakeImage()
    image.errors = [moved, moved]
    assert take(image) == ME
    assert image.now_s > 0


@contextmanager
def predecessor(device: str = "vol0", run_dir: str = "/run") -> Iterator[tuple[FakeImage, Popen[bytes]]]:
    """An image whose lock a backend of this device has that has not attached yet, and its process."""
    hint = Hint(device, Path(run_dir), former_owner="")
    with Popen(["sleep", "600"]) as process:
        mark = ProcessMark.of_this(hint)
        assert mark is not None
        image = FakeImage(BEFORE, watchers=(BEFORE,))
        image.on_record[MARK] = mark._replace(pid=process.pid, started_ticks=_started(process.pid)).text(
            BEFORE
        )
        try:
            yield image, process
        finally:
            process.kill()


def _started(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[19])


def kill(process: Popen[bytes]) -> None:
    process.kill()
    process.wait()


def test_the_lock_of_a_predecessor_that_died_before_its_attach_is_broken_at_once() -> None:
    with predecessor() as (image, process):
        kill(process)
        assert take(image) == ME
        assert (image.broken, image.now_s) == ([BEFORE], 0)


def test_a_predecessor_that_lives_keeps_its_lock_though_it_has_not_attached() -> None:
    with predecessor() as (image, _):
        with pytest.raises(BackendError, match=f"locked by {BEFORE}"):
            take(image)
        assert image.broken == []


@pytest.mark.parametrize("other", [{"device": "vol1"}, {"run_dir": "/run/other"}])
def test_a_dead_backend_of_another_device_or_daemon_keeps_its_lock(other: dict[str, str]) -> None:
    with predecessor(**other) as (image, process):
        kill(process)
        with pytest.raises(BackendError, match=f"locked by {BEFORE}"):
            take(image)
        assert image.broken == []


def test_a_mark_says_nothing_of_another_owner() -> None:
    with predecessor() as (image, process):
        kill(process)
        image.owner, image.open_by = OTHER, [ME, OTHER]
        with pytest.raises(BackendError, match=f"locked by {OTHER}"):
            take(image)
        assert image.broken == []


def test_another_process_with_the_number_of_one_that_died_is_told_apart() -> None:
    mark = ProcessMark.of_this(Hint("vol0", Path("/run")))
    assert mark is not None
    assert not mark.follows(mark.text(BEFORE), BEFORE)
    earlier = mark._replace(started_ticks=mark.started_ticks - 1)
    assert mark.follows(earlier.text(BEFORE), BEFORE)


@pytest.mark.parametrize(
    "record", ["", BEFORE, "{0} {1} 1", "{0} {1} x y", "{0} {1} -1 5", "{0} {1} 0x1 5 6"]
)
def test_a_record_that_is_no_mark_names_nobody(record: str) -> None:
    mark = ProcessMark.of_this(Hint("vol0", Path("/run")))
    assert mark is not None
    assert not mark.follows(record.format(BEFORE, mark.place), BEFORE)


def test_a_process_of_another_user_counts_as_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    mark = ProcessMark.of_this(Hint("vol0", Path("/run")))
    assert mark is not None

    def kill_refused(pid: int, number: int) -> None:
        raise PermissionError

    # As where /proc hides the processes of other users.
    monkeypatch.setattr("os.kill", kill_refused)
    assert not mark._replace(pid=2**22 + 1).follows(mark._replace(pid=2**22 + 1).text(BEFORE), BEFORE)


def test_the_mark_is_on_record_before_the_lock_and_names_this_process() -> None:
    image = FakeImage()
    image.errors = [errno.EROFS]
    assert take(image) == ME
    mark = ProcessMark.of_this(Hint("vol0", Path("/run")))
    assert mark is not None and image.on_record == {MARK: mark.text(ME)}


def test_without_an_own_address_the_lock_is_taken_and_no_mark_is_left() -> None:
    image = FakeImage()
    image.own_address = ""
    assert take(image) == ME
    assert image.on_record == {}


NODE = Path("/dev/ublkb0")


def hint(former: str = BEFORE, node: Path | None = NODE, **more: object) -> Hint:
    return Hint("vol0", Path("/run"), node=node, former_owner=former, **more)  # type: ignore[arg-type]


def test_an_image_that_another_machine_has_served_since_is_refused_though_its_lock_is_free() -> None:
    elsewhere = served_by(Hint("vol0", Path("/run"), former_owner=""), OTHER)
    with pytest.raises(BackendError, match=rf"{OTHER} has served the image since.*del --force vol0"):
        check_not_served_elsewhere(hint(), elsewhere, "pool/img")


@pytest.mark.parametrize(
    ("known", "on_record"),
    [
        (hint(), served_by(hint(), ME)),
        (hint(ME), served_by(hint(), ME)),
        (hint(), ""),
        (hint(""), OTHER),
        (hint(node=None), OTHER),
        (hint(takes_next=True), OTHER),
    ],
    ids=[
        "a successor that died before it was on record",
        "one that died after that",
        "an image of an earlier version",
        "no owner is known",
        "no disk, whose clients know nothing",
        "rebind",
    ],
)
def test_an_image_that_only_this_machine_has_served_since_is_not_refused(known: Hint, on_record: str) -> None:
    check_not_served_elsewhere(known, on_record, "pool/img")


def test_another_error_is_raised() -> None:
    image = FakeImage()
    image.errors = [errno.ESHUTDOWN]
    with pytest.raises(OSError, match="lock"):
        take(image)
