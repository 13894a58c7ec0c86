"""The ublk ABI: opcodes, flags, structures, limits.  Numbers only, from include/uapi/linux/ublk_cmd.h.

The numbers are written out because Debian 12's header has only 5 of the flags; `tests/unit/test_abi.py` pins every size
and opcode.
"""

import enum
import struct
from typing import NamedTuple, Self

CONTROL_PATH = "/dev/ublk-control"
QUEUE_DEPTH_MAX = 4096
QUEUE_COUNT_MAX = 4096
IO_BYTES_MAX = 32 << 20
DEVICE_ANY = 0xFFFFFFFF
"""Device number with which ADD_DEV lets the driver choose."""
QUEUE_NONE = 0xFFFF
SECTOR_SHIFT = 9

_IOC_WRITE, _IOC_READ = 1, 2


def _ioctl(direction: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | ord("u") << 8 | number


def _control(number: int) -> int:
    return _ioctl(_IOC_READ | _IOC_WRITE, number, 32)


def _query(number: int) -> int:
    return _ioctl(_IOC_READ, number, 32)


class Control(enum.IntEnum):
    """Control commands, ioctl-encoded: the plain numbers can be compiled out of a kernel."""

    GET_QUEUE_AFFINITY = _query(0x01)
    GET_DEV_INFO = _query(0x02)
    ADD_DEV = _control(0x04)
    DEL_DEV = _control(0x05)
    START_DEV = _control(0x06)
    STOP_DEV = _control(0x07)
    SET_PARAMS = _control(0x08)
    GET_PARAMS = _query(0x09)
    START_USER_RECOVERY = _control(0x10)
    END_USER_RECOVERY = _control(0x11)
    GET_DEV_INFO2 = _query(0x12)
    GET_FEATURES = _query(0x13)
    DEL_DEV_ASYNC = _query(0x14)
    UPDATE_SIZE = _control(0x15)
    QUIESCE_DEV = _control(0x16)
    TRY_STOP_DEV = _control(0x17)
    REG_BUF = _control(0x18)


class Io(enum.IntEnum):
    """Commands on a queue's ring; `csrc/io_command.h` has the same numbers."""

    FETCH_REQ = _ioctl(_IOC_READ | _IOC_WRITE, 0x20, 16)
    COMMIT_AND_FETCH_REQ = _ioctl(_IOC_READ | _IOC_WRITE, 0x21, 16)
    NEED_GET_DATA = _ioctl(_IOC_READ | _IOC_WRITE, 0x22, 16)


class Feature(enum.IntFlag):
    """`UBLK_F_*`: the features that a driver offers or a device has."""

    SUPPORT_ZERO_COPY = 1 << 0
    URING_CMD_COMP_IN_TASK = 1 << 1
    NEED_GET_DATA = 1 << 2
    USER_RECOVERY = 1 << 3
    USER_RECOVERY_REISSUE = 1 << 4
    UNPRIVILEGED_DEV = 1 << 5
    CMD_IOCTL_ENCODE = 1 << 6
    USER_COPY = 1 << 7
    ZONED = 1 << 8
    USER_RECOVERY_FAIL_IO = 1 << 9
    UPDATE_SIZE = 1 << 10
    AUTO_BUF_REG = 1 << 11
    QUIESCE = 1 << 12
    PER_IO_DAEMON = 1 << 13
    BUF_REG_OFF_DAEMON = 1 << 14
    BATCH_IO = 1 << 15
    INTEGRITY = 1 << 16
    SAFE_STOP_DEV = 1 << 17
    NO_AUTO_PART_SCAN = 1 << 18
    SHMEM_ZC = 1 << 19
    IO_DESC_SIZE = 1 << 20


def feature_names(bits: int) -> list[str]:
    """The names of the set bits, lowest first; an unknown bit n is `BIT_n`."""
    known = {feature.value: feature.name for feature in Feature}
    return [known.get(1 << n) or f"BIT_{n}" for n in range(64) if bits >> n & 1]


class DeviceState(enum.IntEnum):
    """`UBLK_S_DEV_*`."""

    DEAD = 0
    LIVE = 1
    QUIESCED = 2
    FAIL_IO = 3


_DEVICE_INFO = struct.Struct("<4H2IiI2Q2I2Q")


class DeviceInfo(NamedTuple):
    """struct ublksrv_ctrl_dev_info (64 bytes); sizes in bytes."""

    queues: int = 0
    depth: int = 0
    state: int = 0
    pad0: int = 0
    max_io_bytes: int = 0
    device_number: int = DEVICE_ANY
    server_pid: int = 0
    pad1: int = 0
    flags: int = 0
    server_flags: int = 0
    owner_uid: int = 0
    owner_gid: int = 0
    reserved1: int = 0
    reserved2: int = 0

    def pack(self) -> bytes:
        return _DEVICE_INFO.pack(*self)

    @classmethod
    def unpack(cls, raw: bytes) -> Self:
        return cls._make(_DEVICE_INFO.unpack(raw))


DEVICE_INFO_BYTES = _DEVICE_INFO.size


class Attribute(enum.IntFlag):
    """`UBLK_ATTR_*` of the basic parameters.  Without VOLATILE_CACHE the kernel sends no FLUSH."""

    READ_ONLY = 1 << 0
    ROTATIONAL = 1 << 1
    VOLATILE_CACHE = 1 << 2
    FUA = 1 << 3


SHARED_BUFFER = struct.Struct("<QQII")
"""struct ublk_shmem_buf_reg: address and bytes (at most 4 GiB) in the calling process, flags, 0."""


_PARAM_BASIC, _PARAM_DISCARD, _PARAM_DMA_ALIGN = 1, 2, 1 << 4
_PARAMS = struct.Struct("<2II4B2I2Q4I2H")
PARAMS_BYTES = _PARAMS.size
_DMA_ALIGN = struct.Struct("<48x2I")
"""struct ublk_param_dma_align: a mask, 0; behind the devt and zoned parameters, which are not sent."""
_DEV_SECTORS = 9
"""The place of the disk's sectors in `_PARAMS`."""
_SECTORS_MAX = 0xFFFFFFFF


class Parameters(NamedTuple):
    """The disk's parameters for SET_PARAMS; sizes in bytes."""

    size_bytes: int
    max_io_bytes: int
    logical_block_bytes: int = 512
    physical_block_bytes: int = 4096
    attributes: Attribute = Attribute(0)
    discard_granularity_bytes: int = 0
    discard_max_bytes: int = 0
    write_zeroes_max_bytes: int = 0
    optimal_io_bytes: int = 0
    """0: the physical block."""
    memory_alignment_bytes: int = 0
    """Of the memory in clients' requests; 0: the driver's own, 4.  Since Linux 6.15."""

    @staticmethod
    def size_of(raw: bytes) -> int:
        """The disk's bytes in a struct ublk_params."""
        return int(_PARAMS.unpack_from(raw)[_DEV_SECTORS]) << SECTOR_SHIFT

    def pack(self) -> bytes:
        """The head of struct ublk_params: basic and discard parameters, and the alignment if one is given."""
        types = _PARAM_BASIC | (
            _PARAM_DISCARD if self.discard_max_bytes or self.write_zeroes_max_bytes else 0
        )
        aligned = self._packed_alignment()
        types |= _PARAM_DMA_ALIGN if aligned else 0
        logical, physical = self.logical_block_bytes, max(self.physical_block_bytes, self.logical_block_bytes)
        optimal = max(self.optimal_io_bytes, physical)
        basic = (
            int(self.attributes),
            logical.bit_length() - 1,
            physical.bit_length() - 1,
            optimal.bit_length() - 1,
            logical.bit_length() - 1,
            self.max_io_bytes >> SECTOR_SHIFT,
            0,
            self.size_bytes >> SECTOR_SHIFT,
            0,
        )
        discard = (
            0,
            max(self.discard_granularity_bytes, logical),
            self._whole_blocks(self.discard_max_bytes),
            self._whole_blocks(self.write_zeroes_max_bytes),
            1,
            0,
        )
        return _PARAMS.pack(PARAMS_BYTES + len(aligned), types, *basic, *discard) + aligned

    def _packed_alignment(self) -> bytes:
        return _DMA_ALIGN.pack(self.memory_alignment_bytes - 1, 0) if self.memory_alignment_bytes else b""

    def _whole_blocks(self, nbytes: int) -> int:
        """Sectors in whole blocks, below 2^32: a request's length is a 32-bit count of sectors."""
        per_block = self.logical_block_bytes >> SECTOR_SHIFT
        return min(nbytes >> SECTOR_SHIFT, _SECTORS_MAX) // per_block * per_block
