"""One function per ublk control command.

Each opens /dev/ublk-control, sends one command on a ring of its own and waits: it may block for as long as the driver
does (START_DEV until every tag is fetched, STOP_DEV until requests drain, DEL_DEV until references are gone), so the
daemon calls these in a disposable process (`daemon/kernel/control_process.py`).

Raises `UblkError` with the kernel's errno.

Of an ordinary user (`privilege.py`) the driver wants the path of the device's node before a command's own data, and
judges by the node's mode and owner what that user may do.
"""

import errno
import os
from typing import Any

from ublkpool.ublk import _native
from ublkpool.ublk.abi import (
    CONTROL_PATH,
    DEVICE_ANY,
    DEVICE_INFO_BYTES,
    PARAMS_BYTES,
    QUEUE_NONE,
    SECTOR_SHIFT,
    SHARED_BUFFER,
    Control,
    DeviceInfo,
    Parameters,
)
from ublkpool.ublk.errors import UblkError
from ublkpool.ublk.privilege import is_privileged

_CPU_MASK_BYTES = 512
_WITH_PATH = (Control.GET_DEV_INFO2,)
"""The commands that want it of root as well."""
_WITHOUT_PATH = (Control.GET_FEATURES, Control.ADD_DEV)
"""Those that are about no device."""


def node_path(device: int) -> str:
    """The device's character node, which its server opens."""
    return f"/dev/ublkc{device}"


def _send(
    command: Control,
    device: int,
    buffer: bytearray | None = None,
    data: int = 0,
    queue: int = QUEUE_NONE,
) -> int:
    """Send the command; its data comes back in `buffer`."""
    has_path = command in _WITH_PATH or not (is_privileged() or command in _WITHOUT_PATH)
    path = node_path(device).encode() if has_path else b""
    sent = bytearray(path) + (buffer or b"")
    result = _exchange(command, device, sent, len(path), data, queue)
    if buffer is not None:
        buffer[:] = sent[len(path) :]
    return result


def _exchange(
    command: Control, device: int, sent: bytearray, path_bytes: int, data: int, queue: int = QUEUE_NONE
) -> int:
    try:
        fd = os.open(CONTROL_PATH, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise UblkError(CONTROL_PATH, error.errno or 0) from error
    try:
        view = _native.ffi.from_buffer(sent) if sent else _native.ffi.NULL
        result: int = _native.lib.uq_control(fd, command, device, queue, view, len(sent), path_bytes, data)
    finally:
        os.close(fd)
    if result < 0:
        raise UblkError(f"{command.name} of device {'new' if device == DEVICE_ANY else device}", -result)
    return result


def get_features() -> int:
    """GET_FEATURES (Linux 6.5): the `Feature` bits that this driver offers."""
    buffer = bytearray(8)
    _send(Control.GET_FEATURES, DEVICE_ANY, buffer)
    return int.from_bytes(buffer, "little")


def add_device(info: DeviceInfo) -> DeviceInfo:
    """ADD_DEV: makes /dev/ublkcN.  The answer differs from what was asked: read flags, queues and sizes from it."""
    buffer = bytearray(info.pack())
    _send(Control.ADD_DEV, info.device_number, buffer)
    return DeviceInfo.unpack(bytes(buffer))


def delete_device(device: int) -> None:
    """DEL_DEV: blocks until no process holds /dev/ublkcN; the device has gone before that, and its node with it."""
    _send(Control.DEL_DEV, device)


def delete_device_later(device: int) -> None:
    """DEL_DEV_ASYNC (Linux 6.9): the same without waiting; the number is free when the last holder has let go.

    The driver refuses it to ordinary users (ublk_ctrl_uring_cmd_permission does not know it): EINVAL.
    """
    _send(Control.DEL_DEV_ASYNC, device)


def set_parameters(device: int, parameters: Parameters) -> None:
    """SET_PARAMS: once, before START_DEV."""
    _send(Control.SET_PARAMS, device, bytearray(parameters.pack().ljust(PARAMS_BYTES, b"\0")))


def disk_bytes(device: int) -> int:
    """GET_PARAMS: the disk's size, which UPDATE_SIZE changes as well; 0 before SET_PARAMS."""
    buffer = bytearray(PARAMS_BYTES.to_bytes(4, "little").ljust(PARAMS_BYTES, b"\0"))
    _send(Control.GET_PARAMS, device, buffer)
    return Parameters.size_of(bytes(buffer))


def update_size(device: int, size_bytes: int) -> None:
    """UPDATE_SIZE (Linux 6.16, `Feature.UPDATE_SIZE`): change the disk's size, in whole sectors, while it is in use.

    The driver checks nothing and takes any size.  It sets the capacity (set_capacity_and_notify), so that udev hears
    a `change` event with RESIZE=1; no request waits for it.  Only after START_DEV: a driver before 7.0, or without the
    fix "ublk: fix NULL pointer dereference in ublk_ctrl_set_size()", crashes if there is no disk.
    """
    _send(Control.UPDATE_SIZE, device, data=size_bytes >> SECTOR_SHIFT)


def register_buffer(device: int, memory: Any, size_bytes: int) -> int:
    """REG_BUF (Linux 7.x, for a device with `Feature.SHMEM_ZC`): the number by which requests name this memory.

    `memory` is this process's mapping, whole pages, at most 4 GiB.  The driver pins its pages until
    UNREG_BUF or DEL_DEV, whoever ends, and knows requests by them: those whose pages lie one behind the other in one
    buffer come with the flag, all others are copied (ublk_try_buf_match).

    Only before START_DEV.  Of a device that has a disk both commands freeze its queue, which waits for every request,
    and hold a lock meanwhile that START_USER_RECOVERY wants (ublk_lock_buf_tree): a worker that dies just then leaves
    requests which nobody can ever answer, and the device hangs for good.
    """
    address = int(_native.ffi.cast("uintptr_t", memory))
    return _send(Control.REG_BUF, device, bytearray(SHARED_BUFFER.pack(address, size_bytes, 0, 0)))


def start_device(device: int, server_pid: int) -> None:
    """START_DEV: blocks until every tag is fetched and the partition scan has been served.

    `server_pid` is the process that opened /dev/ublkcN (checked by 7.x).
    """
    _send(Control.START_DEV, device, data=server_pid)


def stop_device(device: int) -> None:
    """STOP_DEV: removes the disk, waits for its requests, then cancels every fetched tag."""
    _send(Control.STOP_DEV, device)


def try_stop_device(device: int) -> None:
    """TRY_STOP_DEV (Linux 7.0, `Feature.SAFE_STOP_DEV`): the same, or `UblkError` EBUSY if a process has the disk open.

    Openers are counted under the disk's `open_mutex`, which a partition scan holds as well: it may wait for that.
    """
    _send(Control.TRY_STOP_DEV, device)


def start_recovery(device: int) -> None:
    """START_USER_RECOVERY: EBUSY until the device is QUIESCED."""
    _send(Control.START_USER_RECOVERY, device)


def complete_fetch_round(device: int, queues: int, depth: int) -> None:
    """FETCH_REQ for every tag that no task has fetched since the last START_USER_RECOVERY; the caller ends right after.

    Before Linux 6.15 the driver takes START_USER_RECOVERY for granted: with a queue that no task has fetched it crashes
    (`ublk_queue_reinit` puts a task that is not there), and what was fetched by a task that died cannot be fetched
    again.  Once every queue has, or had, a task, START_USER_RECOVERY makes all of them new.  Raises `UblkError`: EBUSY
    while another process holds /dev/ublkcN.
    """
    path = node_path(device)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise UblkError(path, error.errno or 0) from error
    result: int = _native.lib.uq_fetch_round(fd, queues, depth)
    if result < 0:
        raise UblkError(f"FETCH_REQ of device {device}", -result)


def quiesce_device(device: int, timeout_ms: int) -> None:
    """QUIESCE_DEV (Linux 6.16, for a device with `Feature.QUIESCE`): new requests wait, fetched tags are given back.

    What workers hold they may still answer; the device is QUIESCED when the last of them has closed it.  Raises
    `UblkError`: ETIMEDOUT if a queue had no tag to give back in time, and then the device goes on.
    """
    _send(Control.QUIESCE_DEV, device, data=timeout_ms)


def end_recovery(device: int, server_pid: int) -> None:
    """END_USER_RECOVERY: EBUSY until every tag is fetched again."""
    _send(Control.END_USER_RECOVERY, device, data=server_pid)


def device_info(device: int) -> DeviceInfo:
    """GET_DEV_INFO."""
    buffer = bytearray(DEVICE_INFO_BYTES)
    _send(Control.GET_DEV_INFO, device, buffer)
    return DeviceInfo.unpack(bytes(buffer))


def device_info_by_path(device: int) -> DeviceInfo:
    """GET_DEV_INFO2 (Linux 6.5): the same of any device, a user's too, for root and for its owner."""
    buffer = bytearray(DEVICE_INFO_BYTES)
    _send(Control.GET_DEV_INFO2, device, buffer)
    return DeviceInfo.unpack(bytes(buffer))


def expect_mark(device: int, mark: int) -> None:
    """Raises `UblkError` ENODEV unless the device with this number is the one that was added with this mark.

    A number is free as soon as its device is deleted, by any program, and the next ADD_DEV of any program may take it:
    a command sent by number alone would then hit a stranger's device.  The mark is `server_flags`, which the driver
    keeps for the server and never looks at.  For right before a command, in the process that sends it.
    """
    info = device_info(device)
    if info.server_flags != mark:
        raise UblkError(
            f"device {device} is another server's now (process {info.server_pid}), ours is gone", errno.ENODEV
        )


def queue_cpus(device: int, queue: int) -> list[int]:
    """GET_QUEUE_AFFINITY: the CPUs whose requests come to this queue."""
    buffer = bytearray(_CPU_MASK_BYTES)
    _send(Control.GET_QUEUE_AFFINITY, device, buffer, data=queue)
    mask = int.from_bytes(buffer, "little")
    return [cpu for cpu in range(8 * _CPU_MASK_BYTES) if mask >> cpu & 1]
