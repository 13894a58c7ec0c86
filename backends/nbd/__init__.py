"""An export of an NBD server as a store: nbdkit and its plugins, qemu-nbd, remote exports.

`backend.py` is the backend, `session.py` the requests over the life of several connections, `connection.py` one
connection, `connector.py` the thread that makes connections, `unflushed.py` the writes that the server may still lose,
`library.py` the C library.
"""

from ublkpool.backends.nbd.backend import NbdBackend

BACKEND = NbdBackend
