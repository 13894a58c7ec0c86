"""The wire: every byte that workers, backends, the broker and the daemon exchange.

Descriptors (`descriptors.py`) carry requests and answers, attach messages (`attach.py`) connect a backend with a
device. Both are pure: they know no sockets, memory or state.
"""

from ublkpool.bufpool.wire.attach import (
    ATTACH_MESSAGE_BYTES_MAX as ATTACH_MESSAGE_BYTES_MAX,
)
from ublkpool.bufpool.wire.attach import (
    PROTOCOL_VERSION as PROTOCOL_VERSION,
)
from ublkpool.bufpool.wire.attach import (
    TOKEN_BYTES as TOKEN_BYTES,
)
from ublkpool.bufpool.wire.attach import (
    Attach as Attach,
)
from ublkpool.bufpool.wire.attach import (
    Attached as Attached,
)
from ublkpool.bufpool.wire.attach import (
    BackendMessage as BackendMessage,
)
from ublkpool.bufpool.wire.attach import (
    BufferLeased as BufferLeased,
)
from ublkpool.bufpool.wire.attach import (
    DaemonMessage as DaemonMessage,
)
from ublkpool.bufpool.wire.attach import (
    Describe as Describe,
)
from ublkpool.bufpool.wire.attach import (
    Described as Described,
)
from ublkpool.bufpool.wire.attach import (
    Detach as Detach,
)
from ublkpool.bufpool.wire.attach import (
    Excluded as Excluded,
)
from ublkpool.bufpool.wire.attach import (
    Grown as Grown,
)
from ublkpool.bufpool.wire.attach import (
    Identity as Identity,
)
from ublkpool.bufpool.wire.attach import (
    LeaseBuffer as LeaseBuffer,
)
from ublkpool.bufpool.wire.attach import (
    Leaving as Leaving,
)
from ublkpool.bufpool.wire.attach import (
    Live as Live,
)
from ublkpool.bufpool.wire.attach import (
    OpenRing as OpenRing,
)
from ublkpool.bufpool.wire.attach import (
    Refused as Refused,
)
from ublkpool.bufpool.wire.attach import (
    Resize as Resize,
)
from ublkpool.bufpool.wire.attach import (
    Resized as Resized,
)
from ublkpool.bufpool.wire.attach import (
    RingOpened as RingOpened,
)
from ublkpool.bufpool.wire.attach import (
    Segment as Segment,
)
from ublkpool.bufpool.wire.attach import (
    SessionMessage as SessionMessage,
)
from ublkpool.bufpool.wire.attach import (
    decode_backend_message as decode_backend_message,
)
from ublkpool.bufpool.wire.attach import (
    decode_daemon_message as decode_daemon_message,
)
from ublkpool.bufpool.wire.attach import (
    decode_session_message as decode_session_message,
)
from ublkpool.bufpool.wire.attach import (
    encode_message as encode_message,
)
from ublkpool.bufpool.wire.descriptors import (
    CLIENT_SLICES_MAX as CLIENT_SLICES_MAX,
)
from ublkpool.bufpool.wire.descriptors import (
    DESCRIPTOR_BYTES as DESCRIPTOR_BYTES,
)
from ublkpool.bufpool.wire.descriptors import (
    DESCRIPTORS_PER_FRAME_MAX as DESCRIPTORS_PER_FRAME_MAX,
)
from ublkpool.bufpool.wire.descriptors import (
    SEGMENT_CLIENTS as SEGMENT_CLIENTS,
)
from ublkpool.bufpool.wire.descriptors import (
    SEGMENT_NONE as SEGMENT_NONE,
)
from ublkpool.bufpool.wire.descriptors import (
    SEGMENT_POOL as SEGMENT_POOL,
)
from ublkpool.bufpool.wire.descriptors import (
    Descriptor as Descriptor,
)
from ublkpool.bufpool.wire.descriptors import (
    Flag as Flag,
)
from ublkpool.bufpool.wire.descriptors import (
    Kind as Kind,
)
from ublkpool.bufpool.wire.descriptors import (
    Op as Op,
)
from ublkpool.bufpool.wire.descriptors import (
    RawDescriptor as RawDescriptor,
)
from ublkpool.bufpool.wire.descriptors import (
    iter_frame as iter_frame,
)
from ublkpool.bufpool.wire.descriptors import (
    iter_raw as iter_raw,
)
from ublkpool.bufpool.wire.descriptors import (
    pack_answer as pack_answer,
)
from ublkpool.bufpool.wire.descriptors import (
    pack_frame as pack_frame,
)
from ublkpool.bufpool.wire.descriptors import (
    pack_slots as pack_slots,
)
from ublkpool.bufpool.wire.descriptors import (
    unpack_slots as unpack_slots,
)
