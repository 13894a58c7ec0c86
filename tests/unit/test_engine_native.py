"""The native engine's constants and layout equal those of the wire."""

import pytest

from ublkpool.bufpool import wire
from ublkpool.bufpool.engine._engine import ffi, lib


@pytest.mark.parametrize("kind", ["REQUEST", "PLACE", "DATA", "RELEASE", "WELCOME", "FENCE"])
def test_kinds_to_a_backend(kind: str) -> None:
    assert getattr(lib, f"WIRE_{kind}") == wire.Kind[kind]


@pytest.mark.parametrize("kind", ["PLACED", "REJECT", "DONE", "FENCED", "POST"])
def test_kinds_from_a_backend(kind: str) -> None:
    assert getattr(lib, f"WIRE_{kind}") == wire.Kind[kind]


def test_operations_flags_and_segments() -> None:
    assert {op.name: getattr(lib, f"WIRE_{op.name}") for op in wire.Op} == {
        op.name: int(op) for op in wire.Op
    }
    assert {flag.name: getattr(lib, f"WIRE_{flag.name}") for flag in wire.Flag} == {
        flag.name: int(flag) for flag in wire.Flag
    }
    assert (lib.WIRE_SEGMENT_NONE, lib.WIRE_SEGMENT_POOL) == (wire.SEGMENT_NONE, wire.SEGMENT_POOL)
    assert lib.WIRE_FRAME_DESCRIPTORS_MAX == wire.DESCRIPTORS_PER_FRAME_MAX
    assert lib.WIRE_CLIENT_SLICES_MAX == wire.CLIENT_SLICES_MAX


def test_the_layout_is_the_wires() -> None:
    sent = wire.Descriptor(*range(1, 15))
    native = ffi.from_buffer("struct wire_descriptor *", sent.pack())
    assert ffi.sizeof("struct wire_descriptor") == wire.DESCRIPTOR_BYTES
    assert wire.Descriptor(*(getattr(native, field) for field in wire.Descriptor._fields)) == sent
