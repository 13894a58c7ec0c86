"""The stores that may serve a device, and the generation of each attach."""

import asyncio
import itertools
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support.fakes.states import FakeStates
from ublkpool.bufpool import wire
from ublkpool.bufpool.errors import AttachRefused
from ublkpool.daemon.device.binding import GENERATION_JUMP_MAX, Binding, boot_id
from ublkpool.daemon.device.state import StateDirectory
from ublkpool.daemon.errors import DaemonError

SIZE = 1 << 20
A = wire.Identity(value="file:a", store="/x/a.img (inode 12)")
B = wire.Identity(value="file:b", store="/x/a.img (inode 13)")
MEMORY = wire.Identity(in_boot="memory:1", store="the memory disk of vol0", ends_with_device=True)
PLUGGED = wire.Identity(value="disk:place:usb1", in_boot="disk:seq:7", strength="weak", store="sdb")


class Name:
    """One device's name over the lives of its daemons."""

    def __init__(self) -> None:
        self.states = FakeStates()
        self.boot = "first boot"
        self.restart()

    def restart(self) -> None:
        self.binding = Binding("vol0", self.states, self.boot)  # type: ignore[arg-type]

    def reboot(self) -> None:
        self.boot += "+"
        self.restart()

    def rebind(self) -> None:
        self.do("rebind")

    def attach(
        self, identity: wire.Identity | None, live: bool = True, kind: str = "file", **more: Any
    ) -> int:
        message = wire.Attach(v=1, device="vol0", kind=kind, identity=identity, **more)
        generation = asyncio.run(self.binding.bind(message, more.get("size_bytes") or SIZE))
        if live:
            self.binding.served()
        return generation

    def refusal(self, identity: wire.Identity | None, **more: Any) -> str:
        before = self.states.get("vol0")
        with pytest.raises(AttachRefused) as refused:
            self.attach(identity, **more)
        assert self.states.get("vol0") == before, "what is refused changes nothing"
        return str(refused.value)

    def do(self, what: str) -> None:
        asyncio.run(getattr(self.binding, what)())


@pytest.fixture
def name() -> Name:
    return Name()


def test_the_generation_rises_at_every_attach_whatever_happens_in_between(name: Name) -> None:
    seen = [name.attach(A)]
    for event in ("restart", "reboot", "forget", "undo", "end", "rebind"):
        getattr(name, event)() if event in ("restart", "reboot") else name.do(event)
        seen.append(name.attach(A, live=False))
    assert all(earlier < later for earlier, later in itertools.pairwise(seen)), seen


def test_a_store_that_has_seen_a_higher_generation_is_given_one_above(name: Name) -> None:
    assert name.attach(A, generation_seen=41) == 42
    assert name.attach(A, generation_seen=7) == 43


def test_an_accepted_store_is_durable_before_the_backend_hears_of_it(name: Name) -> None:
    name.states.broken = "state directory /s: cannot write vol0.json: No space left on device"
    with pytest.raises(DaemonError, match="No space left"):
        name.attach(A)
    name.states.broken = ""
    assert name.attach(A) == 1


def test_only_a_device_that_was_never_served_may_have_a_new_store(name: Name) -> None:
    assert name.binding.may_create()
    name.attach(A)
    for event in (None, name.restart, name.reboot, name.rebind):
        if event is not None:
            event()
        assert not name.binding.may_create()
    name.do("forget")
    assert name.binding.may_create()


def test_another_store_is_refused_and_the_refusal_names_both_and_the_way_out(name: Name) -> None:
    name.attach(A)
    for event in (None, name.restart, name.reboot):
        if event is not None:
            event()
        refusal = name.refusal(B)
        assert "/x/a.img (inode 12)" in refusal and "/x/a.img (inode 13)" in refusal
        assert refusal.endswith("ublkpool rebind vol0")
        assert "without an identity" in name.refusal(None)
    assert name.attach(A)


def test_rebind_accepts_one_store_once(name: Name) -> None:
    name.attach(A)
    name.do("rebind")
    name.attach(B)
    name.restart()
    assert "inode 12" in name.refusal(A)
    name.attach(B)


def test_rebind_that_was_not_needed_ends_with_the_next_attach(name: Name) -> None:
    name.attach(A)
    name.do("rebind")
    name.attach(A)
    name.refusal(B)


def test_a_deleted_device_may_have_any_store(name: Name) -> None:
    name.attach(A)
    name.do("forget")
    assert name.attach(B) == 2


def test_a_device_that_ends_with_its_daemon_keeps_its_store(name: Name) -> None:
    name.attach(A)
    name.do("end")
    name.restart()
    name.refusal(B)


def test_a_device_that_never_became_live_is_not_bound(name: Name) -> None:
    name.attach(A, live=False)
    name.do("undo")
    assert name.attach(B) == 2
    name.restart()
    name.do("rebind")
    name.attach(A, live=False)
    name.do("undo")
    name.attach(A), name.refusal(B)


@pytest.mark.parametrize("size_bytes", [SIZE - 512, 512])
def test_a_store_that_has_become_shorter_is_refused(name: Name, size_bytes: int) -> None:
    name.attach(A, size_bytes=SIZE)
    name.reboot()
    refusal = name.refusal(A, size_bytes=size_bytes)
    assert str(SIZE) in refusal and str(size_bytes) in refusal and "/x/a.img" in refusal
    name.attach(A, size_bytes=2 * SIZE)


def test_other_memory_is_refused_in_the_same_boot_and_accepted_in_the_next(name: Name) -> None:
    name.attach(MEMORY)
    other = msgspec.structs.replace(MEMORY, in_boot="memory:2")
    assert not name.binding.may_create()
    name.refusal(other)
    name.restart()
    name.refusal(other)
    name.reboot()
    assert name.binding.may_create()
    name.attach(other)


def test_memory_ends_with_its_device_and_may_be_replaced_on_purpose(name: Name) -> None:
    other = msgspec.structs.replace(MEMORY, in_boot="memory:2")
    name.attach(MEMORY)
    name.do("rebind")
    assert name.binding.may_create()
    name.attach(other)
    name.do("end")
    assert name.binding.may_create()
    name.attach(MEMORY)


def test_a_disk_without_a_serial_number_is_known_by_the_boot_s_identity(name: Name) -> None:
    name.attach(PLUGGED)
    replugged = msgspec.structs.replace(PLUGGED, in_boot="disk:seq:8")
    name.refusal(replugged)
    name.reboot()
    name.attach(replugged)
    name.refusal(PLUGGED)
    name.refusal(msgspec.structs.replace(replugged, value="disk:place:usb2"))


def test_the_first_identity_of_a_store_that_had_none_is_learnt(name: Name) -> None:
    name.attach(None)
    assert not name.binding.may_create()
    name.attach(A)
    name.refusal(B)


def test_a_store_without_an_identity_is_replaced_by_no_other_kind_and_by_no_new_store(name: Name) -> None:
    name.attach(None, kind="mycache")
    for event in (None, name.restart, name.reboot):
        if event is not None:
            event()
        assert not name.binding.may_create()
        for identity in (A, MEMORY, None):
            refusal = name.refusal(identity)
            assert "the backend mycache" in refusal and refusal.endswith("ublkpool rebind vol0")
        assert "the backend file" in name.refusal(None)
    assert name.attach(None, kind="mycache")
    name.rebind()
    name.attach(MEMORY, kind="memory")
    assert not name.binding.may_create()


def test_a_store_without_an_identity_that_has_become_shorter_is_refused(name: Name) -> None:
    name.attach(None, kind="mycache", size_bytes=SIZE)
    assert "rebind" in name.refusal(None, kind="mycache", size_bytes=SIZE - 512)


@pytest.mark.parametrize("before", [A, wire.Identity(value="memory:unkept"), None])
def test_rebind_lets_a_backend_make_a_store_that_nobody_can_bring_back(
    name: Name, before: wire.Identity | None
) -> None:
    name.attach(before)
    assert not name.binding.takes_next()
    name.rebind()
    assert name.binding.takes_next() and not name.binding.may_create()
    name.attach(MEMORY)
    assert not name.binding.takes_next()


def test_a_backend_that_ended_before_the_disk_started_binds_nothing(name: Name) -> None:
    name.attach(A, live=False)
    name.do("backend_ended")
    assert name.binding.may_create()
    name.attach(B, live=False)
    name.binding.starting()
    name.do("backend_ended")
    name.refusal(A), name.attach(B, live=False)
    name.binding.served()
    name.do("backend_ended")
    name.refusal(A)


def test_a_smaller_size_is_told_as_what_the_backend_offers(name: Name) -> None:
    name.attach(A, size_bytes=SIZE)
    refusal = name.refusal(A, size_bytes=SIZE // 2)
    assert (
        f"this backend offers {SIZE // 2} bytes" in refusal
        and "size=" in refusal
        and "has only" not in refusal
    )


def test_the_store_that_an_earlier_daemon_served_is_learnt_if_none_is_known(name: Name) -> None:
    served = wire.Attach(v=1, device="vol0", kind="file", identity=A)
    asyncio.run(name.binding.learn(served, SIZE, "file", 9))
    assert not name.binding.may_create()
    asyncio.run(name.binding.learn(msgspec.structs.replace(served, identity=B), SIZE, "file", 5))
    name.refusal(B)
    assert name.attach(A) == 10


def test_a_boot_has_an_id() -> None:
    assert boot_id() == boot_id() and len(boot_id()) == 36


EXT4, XFS = "ef53", "58465342"
UUID, OTHER_UUID = "96da01f2edb45d7b73b6ded9876ded7a", "11111111111111111111111111111111"
INODE64, INODE32 = "81-8300000000000000aabbccdd", "1-83000000aabbccdd"


@pytest.mark.parametrize(
    ("first", "second", "is_same"),
    [
        (f"file:{EXT4}::1-0c00aabb", f"file:{EXT4}:{UUID}:1-0c00aabb", True),
        (f"loop:0:file:{EXT4}::1-0c00aabb:at:2048", f"loop:0:file:{EXT4}:{UUID}:1-0c00aabb:at:2048", True),
        (f"file:{XFS}:{UUID}:{INODE64}", f"file:{XFS}:{UUID}:{INODE32}", True),
        (f"file:{EXT4}::1-0c00aabb", f"file:{EXT4}:{UUID}:1-0c00aabc", False),
        (f"file:{EXT4}:{OTHER_UUID}:1-0c00aabb", f"file:{EXT4}:{UUID}:1-0c00aabb", False),
        (f"file:{XFS}:{UUID}:81-8300000001000000aabbccdd", f"file:{XFS}:{UUID}:{INODE32}", False),
        (f"file:{EXT4}:{UUID}:{INODE64}", f"file:{EXT4}:{UUID}:{INODE32}", False),
        (f"loop:0:file:{EXT4}::1-0c00aabb", f"loop:4096:file:{EXT4}:{UUID}:1-0c00aabb", False),
        (f"loop:0:file:{EXT4}::1-0c00aabb:at:2048", f"loop:0:file:{EXT4}::1-0c00aabb:at:4096", False),
        (f"file:{EXT4}::1-0c00aabb", f"loop:0:file:{EXT4}:{UUID}:1-0c00aabb", False),
    ],
)
def test_a_file_stays_the_same_store_under_a_newer_kernel_and_another_mount_option(
    first: str, second: str, is_same: bool
) -> None:
    """Linux 6.9 brings the file system's UUID, xfs with inode32 another handle of the same file."""
    for bound, brought in ((first, second), (second, first)):
        name = Name()
        name.attach(wire.Identity(value=bound))
        if is_same:
            name.attach(wire.Identity(value=brought))
        else:
            assert "ublkpool rebind vol0" in name.refusal(wire.Identity(value=brought))


@pytest.mark.parametrize(("sequence", "is_same"), [(5, True), (6, False)])
def test_a_loop_device_whose_file_cannot_be_opened_is_told_by_its_number_also_after_an_upgrade(
    sequence: int, is_same: bool
) -> None:
    """Earlier versions wrote disk:seq:N; without the file only the inode number is known beside it."""
    brought = wire.Identity(value="loop:0:inode:12", in_boot=f"loop:0:seq:{sequence}", strength="weak")
    for in_boot in ("disk:seq:5", "loop:0:seq:5"):
        name = Name()
        name.attach(wire.Identity(value="loop:0:inode:12", in_boot=in_boot, strength="weak"))
        if is_same:
            name.attach(brought)
        else:
            name.refusal(brought)


def test_a_generation_that_was_never_given_is_refused_and_uses_up_no_number(name: Name) -> None:
    last = name.attach(A)
    assert "was never given" in name.refusal(A, generation_seen=last + GENERATION_JUMP_MAX + 1)
    assert name.attach(A) == last + 1
    assert name.attach(A, generation_seen=last + 1 + GENERATION_JUMP_MAX) == last + 2 + GENERATION_JUMP_MAX


class SlowRunner:
    """Each write waits until the test lets it go on."""

    def __init__(self) -> None:
        self.gates: list[asyncio.Event] = []

    async def run_beside(self, _what: str, command: Any, *_: object, **_more: object) -> None:
        if self.gates:
            await self.gates.pop(0).wait()
        command()


@pytest.mark.parametrize("change", ["forget", "rebind"])
def test_a_change_of_the_name_and_an_attach_at_once_come_one_after_the_other(
    tmp_path: Path, change: str
) -> None:
    async def run() -> None:
        runner = SlowRunner()
        states = StateDirectory(tmp_path, runner)  # type: ignore[arg-type]
        before = await Binding("vol", states, "b").bind(brings(A), SIZE)
        gate = asyncio.Event()
        runner.gates.append(gate)
        changing = asyncio.ensure_future(getattr(Binding("vol", states, "b"), change)())
        await asyncio.sleep(0)
        attaching = asyncio.ensure_future(Binding("vol", states, "b").bind(brings(B), SIZE))
        await asyncio.sleep(0)
        gate.set()
        await changing
        generation = await attaching
        state = states.get("vol")
        assert state.store is not None and state.store.identity == B
        assert (state.generation, state.takes_next) == (generation, False)
        assert generation == before + 1

    asyncio.run(run())


def test_a_store_is_not_forgotten_once_the_name_has_a_device(name: Name) -> None:
    name.attach(A)
    asyncio.run(name.binding.forget(lambda: True))
    assert name.states.knows("vol0")


def brings(identity: wire.Identity) -> wire.Attach:
    return wire.Attach(v=1, device="vol", kind="file", identity=identity)


def test_the_owner_of_the_lock_is_on_record_and_stays_until_the_next_attach(name: Name) -> None:
    name.attach(A, owner="10.0.0.1:0/7")
    for event in ("restart", "reboot", "undo", "rebind", "forget"):
        getattr(name, event)() if event in ("restart", "reboot", "rebind") else name.do(event)
        assert name.binding.owner == "10.0.0.1:0/7", event
    name.attach(A, owner="10.0.0.1:0/8")
    assert name.binding.owner == "10.0.0.1:0/8"
    name.attach(A)
    assert name.binding.owner == ""


def test_an_owner_that_cannot_be_put_on_record_serves_nothing(name: Name) -> None:
    name.states.broken = "state directory /s: cannot write vol0.json: No space left on device"
    with pytest.raises(DaemonError, match="No space left"):
        name.attach(A, owner="10.0.0.1:0/7")
    assert name.binding.owner == ""


def test_a_start_that_is_undone_leaves_its_owner_on_record(name: Name) -> None:
    name.attach(A, live=False, owner="10.0.0.1:0/7")
    name.do("undo")
    assert (name.binding.owner, name.binding.store) == ("10.0.0.1:0/7", None)


def test_a_takeover_is_for_one_attach(name: Name) -> None:
    assert not name.binding.takes_over()
    asyncio.run(name.binding.take_over(True))
    name.restart()
    assert name.binding.takes_over()
    name.attach(A)
    assert not name.binding.takes_over()
    asyncio.run(name.binding.take_over(True))
    asyncio.run(name.binding.take_over(False))
    assert not name.binding.takes_over()
