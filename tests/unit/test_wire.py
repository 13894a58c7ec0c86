"""The wire: sizes and offsets as documented, round trips, and an error for every other shape."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ublkpool.bufpool.errors import PoolError, WireError
from ublkpool.bufpool.wire import (
    ATTACH_MESSAGE_BYTES_MAX,
    DESCRIPTOR_BYTES,
    DESCRIPTORS_PER_FRAME_MAX,
    PROTOCOL_VERSION,
    Attach,
    Attached,
    DaemonMessage,
    Describe,
    Descriptor,
    Detach,
    Flag,
    Kind,
    Live,
    Op,
    Refused,
    Segment,
    decode_backend_message,
    decode_daemon_message,
    encode_message,
    iter_frame,
    pack_frame,
    pack_slots,
    unpack_slots,
)

# Byte offset and size of each field, as in the drawing of wire.py and the table of PROTOCOL.md.
LAYOUT = {
    "kind": (0, 1),
    "op": (1, 1),
    "flags": (2, 2),
    "device": (4, 4),
    "queue": (8, 2),
    "tag": (10, 2),
    "epoch": (12, 4),
    "sequence": (16, 8),
    "offset": (24, 8),
    "length": (32, 8),
    "result": (40, 4),
    "segment": (44, 4),
    "buffer": (48, 8),
    "reserved": (56, 8),
}

descriptors = st.builds(
    Descriptor,
    **{
        name: st.integers(-(1 << 31), (1 << 31) - 1)
        if name == "result"
        else st.integers(0, (1 << 8 * size) - 1)
        for name, (_, size) in LAYOUT.items()
    },
)
slot_lists = st.lists(st.integers(0, (1 << 32) - 1), max_size=50)


@pytest.mark.parametrize("name", LAYOUT)
def test_every_field_has_the_documented_offset(name: str) -> None:
    offset, size = LAYOUT[name]
    value = (1 << (8 * size - 1)) - 2
    packed = Descriptor(kind=0)._replace(**{name: value}).pack()
    assert packed[offset : offset + size] == value.to_bytes(size, "little")
    assert not any(packed[:offset]) and not any(packed[offset + size :])


def test_the_fields_fill_the_descriptor() -> None:
    assert tuple(LAYOUT) == Descriptor._fields
    assert (
        sum(size for _, size in LAYOUT.values()) == DESCRIPTOR_BYTES == len(Descriptor(kind=0).pack()) == 64
    )


def test_the_result_is_signed() -> None:
    assert Descriptor(kind=0, result=-5).pack()[40:44] == struct.pack("<i", -5)


@pytest.mark.parametrize(
    ("name", "value"), [(name, 1 << 8 * size) for name, (_, size) in LAYOUT.items()] + [("length", -1)]
)
def test_a_field_that_does_not_fit_is_an_error(name: str, value: int) -> None:
    with pytest.raises(WireError, match="does not fit the wire"):
        Descriptor(kind=0)._replace(**{name: value}).pack()


def test_numbers_are_those_of_the_protocol() -> None:
    assert [(each.name, each.value) for each in Kind] == [
        ("REQUEST", 1),
        ("PLACE", 2),
        ("DATA", 3),
        ("RELEASE", 4),
        ("WELCOME", 5),
        ("FENCE", 6),
        ("PLACED", 16),
        ("REJECT", 17),
        ("DONE", 18),
        ("HELLO", 19),
        ("FENCED", 20),
        ("POST", 21),
        ("LEASE", 32),
        ("GRANT", 33),
        ("RETURN", 34),
        ("RECALL", 35),
        ("SYNC", 36),
    ]
    assert [each.value for each in Op] == [0, 1, 2, 3, 5]
    assert [each.value for each in Flag] == [1, 2, 4, 8]


@given(st.lists(descriptors, min_size=1, max_size=20))
def test_a_frame_survives_the_round_trip(many: list[Descriptor]) -> None:
    assert list(iter_frame(pack_frame(many))) == many


@pytest.mark.parametrize("size", [0, 1, 63, 65, 64 * (DESCRIPTORS_PER_FRAME_MAX + 1)])
def test_a_frame_that_is_not_whole_descriptors_is_an_error_at_once(size: int) -> None:
    with pytest.raises(WireError, match=f"a frame of {size} bytes"):
        iter_frame(bytes(size))


def test_the_longest_frame_is_taken() -> None:
    assert sum(1 for _ in iter_frame(memoryview(bytes(64 * DESCRIPTORS_PER_FRAME_MAX)))) == 4096


def test_an_answer_repeats_the_identity_and_nothing_of_the_buffer() -> None:
    request = Descriptor(1, 1, Flag.REPLAY, 2, 3, 4, 5, 6, 7, 8, 0, 1, 4096)
    answer = request.answer(Kind.DONE, -5)
    identity = ("device", "queue", "tag", "epoch", "sequence")
    assert all(getattr(answer, name) == getattr(request, name) for name in identity)
    assert (answer.kind, answer.result, answer.flags, answer.segment, answer.buffer) == (
        Kind.DONE,
        -5,
        0,
        0,
        0,
    )


@given(descriptors.filter(lambda each: each.kind not in (Kind.LEASE, Kind.RECALL)), slot_lists)
def test_a_broker_frame_survives_the_round_trip(descriptor: Descriptor, slots: list[int]) -> None:
    frame = pack_slots(descriptor, slots)
    assert len(frame) == 64 + 4 * len(slots)
    assert unpack_slots(frame) == (descriptor._replace(length=len(slots)), tuple(slots))


@pytest.mark.parametrize("kind", [Kind.LEASE, Kind.RECALL])
def test_a_lease_and_a_recall_say_a_number_and_bring_no_slots(kind: Kind) -> None:
    assert unpack_slots(Descriptor(kind, length=9).pack()) == (Descriptor(kind, length=9), ())


@pytest.mark.parametrize("size", [0, 63, 65, 66])
def test_a_broker_frame_of_an_odd_size_is_an_error(size: int) -> None:
    with pytest.raises(WireError, match="no descriptor with slots"):
        unpack_slots(bytes(size))


def test_a_broker_frame_with_a_wrong_slot_count_is_an_error() -> None:
    with pytest.raises(WireError, match="says 3 slots and brings 2"):
        unpack_slots(Descriptor(Kind.RETURN, length=3).pack() + bytes(8))


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_a_wire_error(garbage: bytes) -> None:
    for parse in (
        lambda each: list(iter_frame(each)),
        unpack_slots,
        decode_backend_message,
        decode_daemon_message,
    ):
        try:
            parse(garbage)
        except WireError:
            continue


def attached() -> Attached:
    return Attached(
        v=PROTOCOL_VERSION,
        device="vol",
        device_number=3,
        size_bytes=1 << 30,
        logical_block_bytes=4096,
        queues=2,
        depth=64,
        max_io_bytes=1 << 20,
        need_get_data=True,
        placement="backend",
        read_only=False,
        epoch=1,
        token="00" * 16,
        endpoints=("ipc:///run/q0", "ipc:///run/q1"),
        segments=(Segment(number=1, size_bytes=4096),),
        own_segment=2,
    )


def test_attach_survives_the_round_trip_with_defaults_for_missing_fields() -> None:
    message = Attach(v=PROTOCOL_VERSION, device="vol", kind="memory", placement="any", segment_bytes=8192)
    assert decode_backend_message(encode_message(message)) == message
    short = decode_backend_message(b'{"type":"attach","v":1,"device":"vol","kind":"x"}')
    assert isinstance(short, Attach)
    assert short.logical_block_bytes == 512


def test_a_question_about_a_device_is_told_from_an_attach() -> None:
    question = Describe(v=PROTOCOL_VERSION, device="vol")
    assert decode_backend_message(encode_message(question)) == question


@pytest.mark.parametrize(
    "message", [attached(), Refused(reason="no"), Live(path="/dev/ublkb0"), Detach(reason="removed")]
)
def test_each_message_of_the_daemon_survives_the_round_trip(message: DaemonMessage) -> None:
    packet = encode_message(message)
    assert decode_daemon_message(packet) == message
    assert len(packet) < ATTACH_MESSAGE_BYTES_MAX


@pytest.mark.parametrize(
    ("packet", "reason"),
    [
        (b"", "attach:"),
        (b"\xff{}", "attach:"),
        (b'{"type":"attach","v":1,"device":"vol"}', "kind"),
        (b'{"type":"attached","v":1,"device":"vol","kind":"x"}', "attach"),
        (b'{"type":"attach","v":1,"device":7,"kind":"x"}', "device"),
        (b'{"type":"attach","v":1,"device":"vol","kind":"x","colour":"red"}', "colour"),
        (b'{"type":"attach","v":1,"device":"vol","kind":"x","placement":"moon"}', "placement"),
        (b'{"type":"attach","v":2,"device":"vol","kind":"x"}', "version 2 is not 1"),
    ],
)
def test_an_attach_that_is_wrong_is_refused_with_a_reason(packet: bytes, reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        decode_backend_message(packet)


@pytest.mark.parametrize("packet", [b"", b"[]", b'{"type":"attach"}', b'{"type":"refused"}', b'\xff"'])
def test_a_daemon_message_that_is_wrong_is_an_error(packet: bytes) -> None:
    with pytest.raises(WireError, match="daemon:"):
        decode_daemon_message(packet)


def test_a_wire_error_has_an_errno() -> None:
    assert issubclass(WireError, PoolError)
    assert WireError.errno == 71
