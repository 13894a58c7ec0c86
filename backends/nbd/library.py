"""The C library libnbd, loaded at run time with cffi.

Debian's Python module for it is built for Debian's own Python alone, no package index has it, and its asynchronous
calls copy between a buffer of their own and ours.  Through cffi any Python of a virtual environment can use the
library, and the socket's data goes straight from and to the pool's memory.
"""

from functools import cache
from typing import Any

from cffi import FFI

from ublkpool.bufpool.errors import BackendError

_NAME = "libnbd.so.0"

ffi = FFI()
ffi.cdef(
    """
    struct nbd_handle;
    typedef struct {
        int (*callback) (void *user_data, int *error);
        void *user_data;
        void (*free) (void *user_data);
    } nbd_completion_callback;

    struct nbd_handle *nbd_create (void);
    void nbd_close (struct nbd_handle *h);
    const char *nbd_get_error (void);
    int nbd_get_errno (void);

    int nbd_set_export_name (struct nbd_handle *h, const char *export_name);
    int nbd_set_tls (struct nbd_handle *h, int tls);
    int nbd_set_tls_certificates (struct nbd_handle *h, const char *dir);
    int nbd_set_tls_verify_peer (struct nbd_handle *h, bool verify);
    int nbd_set_tls_username (struct nbd_handle *h, const char *username);
    int nbd_set_tls_psk_file (struct nbd_handle *h, const char *filename);
    int nbd_set_uri_allow_local_file (struct nbd_handle *h, bool allow);
    int nbd_set_pread_initialize (struct nbd_handle *h, bool request);
    int nbd_supports_uri (struct nbd_handle *h);
    int nbd_supports_tls (struct nbd_handle *h);

    int nbd_aio_connect_uri (struct nbd_handle *h, const char *uri);
    int nbd_aio_connect_unix (struct nbd_handle *h, const char *unixsocket);
    int nbd_aio_connect_tcp (struct nbd_handle *h, const char *hostname, const char *port);
    int nbd_aio_disconnect (struct nbd_handle *h, uint32_t flags);

    int nbd_is_read_only (struct nbd_handle *h);
    int nbd_can_flush (struct nbd_handle *h);
    int nbd_can_fua (struct nbd_handle *h);
    int nbd_is_rotational (struct nbd_handle *h);
    int nbd_can_trim (struct nbd_handle *h);
    int nbd_can_zero (struct nbd_handle *h);
    int nbd_can_multi_conn (struct nbd_handle *h);
    int64_t nbd_get_size (struct nbd_handle *h);
    int64_t nbd_get_block_size (struct nbd_handle *h, int size_type);

    int64_t nbd_aio_pread (struct nbd_handle *h, void *buf, size_t count, uint64_t offset,
                           nbd_completion_callback completion, uint32_t flags);
    int64_t nbd_aio_pwrite (struct nbd_handle *h, const void *buf, size_t count, uint64_t offset,
                            nbd_completion_callback completion, uint32_t flags);
    int64_t nbd_aio_flush (struct nbd_handle *h, nbd_completion_callback completion, uint32_t flags);
    int64_t nbd_aio_trim (struct nbd_handle *h, uint64_t count, uint64_t offset,
                          nbd_completion_callback completion, uint32_t flags);
    int64_t nbd_aio_zero (struct nbd_handle *h, uint64_t count, uint64_t offset,
                          nbd_completion_callback completion, uint32_t flags);

    int nbd_aio_get_fd (struct nbd_handle *h);
    unsigned nbd_aio_get_direction (struct nbd_handle *h);
    int nbd_aio_notify_read (struct nbd_handle *h);
    int nbd_aio_notify_write (struct nbd_handle *h);
    int nbd_aio_is_ready (struct nbd_handle *h);
    int nbd_aio_is_processing (struct nbd_handle *h);
    int nbd_aio_is_dead (struct nbd_handle *h);
    int nbd_aio_is_closed (struct nbd_handle *h);
    int nbd_aio_command_completed (struct nbd_handle *h, uint64_t cookie);
    int64_t nbd_aio_peek_command_completed (struct nbd_handle *h);
    """
)


@cache
def library() -> Any:
    """The loaded library.  Raises `BackendError` if it is not installed."""
    try:
        return ffi.dlopen(_NAME)
    except OSError as error:
        raise BackendError(
            f"the backend nbd needs the C library libnbd ({_NAME}), which no Python package brings, nor does "
            "pip install 'ublkpool[nbd]': apt install libnbd0, or dnf install libnbd"
        ) from error


def last_error() -> tuple[int, str]:
    """Errno and text of the last call that failed on this thread."""
    found = library().nbd_get_error()
    text = ffi.string(found) if found else b""
    assert isinstance(text, bytes)
    return int(library().nbd_get_errno()), text.decode(errors="replace")
