"""The package that a backend needs: the wire, the pool's memory, the native engine and the SDK; it needs no root."""

from ublkpool.bufpool.earlier_names import find_earlier_names

find_earlier_names()
