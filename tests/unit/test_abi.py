"""The ABI's numbers equal those that the kernel's header computes."""

import pytest

from ublkpool.bufpool import wire
from ublkpool.ublk import _native, abi


def test_every_control_opcode_is_the_ioctl_number_of_the_header() -> None:
    assert {command.name: command.value for command in abi.Control} == {
        "GET_QUEUE_AFFINITY": 0x80207501,
        "GET_DEV_INFO": 0x80207502,
        "ADD_DEV": 0xC0207504,
        "DEL_DEV": 0xC0207505,
        "START_DEV": 0xC0207506,
        "STOP_DEV": 0xC0207507,
        "SET_PARAMS": 0xC0207508,
        "GET_PARAMS": 0x80207509,
        "START_USER_RECOVERY": 0xC0207510,
        "END_USER_RECOVERY": 0xC0207511,
        "GET_DEV_INFO2": 0x80207512,
        "GET_FEATURES": 0x80207513,
        "DEL_DEV_ASYNC": 0x80207514,
        "UPDATE_SIZE": 0xC0207515,
        "QUIESCE_DEV": 0xC0207516,
        "TRY_STOP_DEV": 0xC0207517,
        "REG_BUF": 0xC0207518,
    }


def test_every_queue_opcode_is_the_ioctl_number_of_the_header() -> None:
    assert [command.value for command in abi.Io] == [0xC0107520, 0xC0107521, 0xC0107522]


def test_structures_have_the_kernel_sizes() -> None:
    assert abi.DEVICE_INFO_BYTES == 64
    assert abi.PARAMS_BYTES == 60
    assert abi.SHARED_BUFFER.size == 24
    assert _native.ffi.sizeof("struct uq_iod") == 24


def test_features_have_names_and_unknown_bits_show_their_number() -> None:
    assert abi.feature_names(0x1FE)[:3] == ["URING_CMD_COMP_IN_TASK", "NEED_GET_DATA", "USER_RECOVERY"]
    assert abi.feature_names(1 << 19 | 1 << 60) == ["SHMEM_ZC", "BIT_60"]


def test_every_feature_of_linux_7_3_has_a_name() -> None:
    names = abi.feature_names(0x1FFFFF)
    assert len(names) == 21 and names[-1] == "IO_DESC_SIZE"
    assert not [name for name in names if name.startswith("BIT_")]


def test_parameters_of_a_7_eib_disk_with_4k_blocks_keep_every_bit() -> None:
    size = 7 << 60
    raw = abi.Parameters(
        size,
        512 << 10,
        logical_block_bytes=4096,
        discard_max_bytes=size,
        attributes=abi.Attribute.VOLATILE_CACHE | abi.Attribute.FUA,
    ).pack()
    assert int.from_bytes(raw[0:4], "little") == 60
    assert int.from_bytes(raw[4:8], "little") == 3
    assert int.from_bytes(raw[8:12], "little") == 0b1100
    assert raw[12:16] == bytes([12, 12, 12, 12])
    assert int.from_bytes(raw[24:32], "little") == size >> 9
    assert int.from_bytes(raw[48:52], "little") == 0xFFFFFFF8


def test_without_discard_the_discard_parameters_are_not_sent() -> None:
    assert abi.Parameters(1 << 20, 4096).pack()[4:8] == b"\1\0\0\0"


def test_device_info_survives_the_round_trip() -> None:
    info = abi.DeviceInfo(queues=4, depth=128, max_io_bytes=1 << 20, server_pid=-1, flags=0x1FE)
    assert abi.DeviceInfo.unpack(info.pack()) == info


@pytest.mark.parametrize(
    ("name", "value"),
    [(kind.name, kind.value) for kind in wire.Kind if kind < wire.Kind.LEASE]
    + [(op.name, op.value) for op in wire.Op]
    + [(flag.name, flag.value) for flag in wire.Flag],
)
def test_the_c_core_and_the_wire_agree_on_every_number(name: str, value: int) -> None:
    assert getattr(_native.lib, f"WIRE_{name}") == value


def test_the_c_core_and_the_wire_agree_on_the_descriptor() -> None:
    assert _native.ffi.sizeof("struct wire_descriptor") == wire.DESCRIPTOR_BYTES
    descriptor = wire.Descriptor(18, 1, 2, 3, 4, 5, 6, 7, 8, 9, -10, 11, 12, 0)
    seen = _native.ffi.cast("struct wire_descriptor *", _native.ffi.from_buffer(descriptor.pack()))
    assert tuple(getattr(seen, name) for name in wire.Descriptor._fields) == descriptor


def test_the_optimal_length_is_the_physical_block_unless_said_otherwise() -> None:
    logical, physical, optimal, minimum = 12, 13, 14, 15
    plain = abi.Parameters(1 << 30, 4096, 512, 8192).pack()
    assert (plain[logical], plain[physical], plain[optimal], plain[minimum]) == (9, 13, 13, 9)
    said = abi.Parameters(1 << 30, 4096, 512, 8192, optimal_io_bytes=4 << 20).pack()
    assert said[optimal] == 22
    assert plain[:optimal] + said[optimal : optimal + 1] + plain[optimal + 1 :] == said
