"""The C libraries librados and librbd, loaded at run time with cffi, so that ublkpool is built and runs without them.

Python's own module for RBD is built for the distribution's Python alone, copies what it reads, and takes no memory of
ours for a write.
"""

import os
from functools import cache
from typing import Any

from cffi import FFI

from ublkpool.bufpool.errors import BackendError

_NAMES = ("librados.so.2", "librbd.so.1")

ffi = FFI()
ffi.cdef(
    """
    typedef void *rados_t;
    typedef void *rados_ioctx_t;
    typedef void *rados_completion_t;
    typedef void (*rados_callback_t)(rados_completion_t cb, void *arg);

    int rados_create(rados_t *cluster, const char *id);
    int rados_conf_read_file(rados_t cluster, const char *path);
    int rados_conf_parse_argv(rados_t cluster, int argc, const char **argv);
    int rados_conf_parse_env(rados_t cluster, const char *var);
    int rados_conf_set(rados_t cluster, const char *option, const char *value);
    int rados_conf_get(rados_t cluster, const char *option, char *buf, size_t len);
    int rados_connect(rados_t cluster);
    void rados_shutdown(rados_t cluster);
    uint64_t rados_get_instance_id(rados_t cluster);
    int rados_cluster_fsid(rados_t cluster, char *buf, size_t len);
    int rados_ioctx_create(rados_t cluster, const char *pool, rados_ioctx_t *ioctx);
    void rados_ioctx_destroy(rados_ioctx_t ioctx);
    void rados_ioctx_set_namespace(rados_ioctx_t ioctx, const char *nspace);
    int64_t rados_ioctx_get_id(rados_ioctx_t ioctx);
    int rados_aio_create_completion2(void *arg, rados_callback_t complete, rados_completion_t *completion);
    int rados_aio_is_complete(rados_completion_t completion);
    int rados_aio_get_return_value(rados_completion_t completion);
    void rados_aio_release(rados_completion_t completion);
    int rados_aio_stat(rados_ioctx_t ioctx, const char *object, rados_completion_t completion, uint64_t *size,
                       long *mtime);
    """
)
ffi.cdef(
    """
    typedef void *rbd_image_t;
    typedef void *rbd_completion_t;
    typedef void (*rbd_update_callback_t)(void *arg);
    typedef struct {
        uint64_t size;
        uint64_t obj_size;
        uint64_t num_objs;
        int order;
        char block_name_prefix[24];
        int64_t parent_pool;
        char parent_name[96];
    } rbd_image_info_t;
    typedef struct { char *addr; int64_t id; uint64_t cookie; } rbd_image_watcher_t;
    typedef struct { char *name; char *value; int source; } rbd_config_option_t;

    int rbd_open(rados_ioctx_t io, const char *name, rbd_image_t *image, const char *snapshot);
    int rbd_open_read_only(rados_ioctx_t io, const char *name, rbd_image_t *image, const char *snapshot);
    int rbd_close(rbd_image_t image);
    int rbd_stat(rbd_image_t image, rbd_image_info_t *info, size_t bytes);
    int rbd_get_size(rbd_image_t image, uint64_t *size);
    int rbd_get_features(rbd_image_t image, uint64_t *features);
    int rbd_get_id(rbd_image_t image, char *id, size_t bytes);
    int rbd_resize2(rbd_image_t image, uint64_t size, bool allow_shrink, void *progress, void *arg);
    int rbd_lock_acquire(rbd_image_t image, int mode);
    int rbd_lock_release(rbd_image_t image);
    int rbd_lock_get_owners(rbd_image_t image, int *mode, char **owners, size_t *count);
    void rbd_lock_get_owners_cleanup(char **owners, size_t count);
    int rbd_lock_break(rbd_image_t image, int mode, const char *owner);
    int rbd_watchers_list(rbd_image_t image, rbd_image_watcher_t *watchers, size_t *count);
    void rbd_watchers_list_cleanup(rbd_image_watcher_t *watchers, size_t count);
    int rbd_config_image_list(rbd_image_t image, rbd_config_option_t *options, int *count);
    void rbd_config_image_list_cleanup(rbd_config_option_t *options, int count);
    int rbd_metadata_get(rbd_image_t image, const char *key, char *value, size_t *bytes);
    int rbd_metadata_set(rbd_image_t image, const char *key, const char *value);
    int rbd_update_watch(rbd_image_t image, uint64_t *handle, rbd_update_callback_t callback, void *arg);

    int rbd_aio_create_completion(void *arg, void (*complete)(rbd_completion_t, void *), rbd_completion_t *completion);
    int64_t rbd_aio_get_return_value(rbd_completion_t completion);
    void rbd_aio_release(rbd_completion_t completion);
    int rbd_aio_read(rbd_image_t image, uint64_t offset, size_t bytes, char *memory, rbd_completion_t completion);
    int rbd_aio_write(rbd_image_t image, uint64_t offset, size_t bytes, const char *memory,
                      rbd_completion_t completion);
    int rbd_aio_flush(rbd_image_t image, rbd_completion_t completion);
    int rbd_aio_discard(rbd_image_t image, uint64_t offset, uint64_t bytes, rbd_completion_t completion);
    int rbd_aio_write_zeroes(rbd_image_t image, uint64_t offset, size_t bytes, rbd_completion_t completion,
                             int zero_flags, int op_flags);
    """
)
_ENGINE_CALLS = (
    *("create_completion", "get_return_value", "release", "read", "write", "flush", "discard"),
    "write_zeroes",
)


class Libraries:
    """Both libraries."""

    def __init__(self) -> None:
        """Raises `OSError` if one is not installed."""
        self.rados: Any
        self.rbd: Any
        self.rados, self.rbd = (ffi.dlopen(each) for each in _NAMES)

    def engine_calls(self) -> dict[str, int]:
        """The addresses of the functions that the native engine calls, see `native.RbdStorage`."""
        return {
            name: int(ffi.cast("uintptr_t", ffi.addressof(self.rbd, f"rbd_aio_{name}")))
            for name in _ENGINE_CALLS
        }


@cache
def libraries() -> Libraries:
    """The loaded libraries.  Raises `BackendError` if they are not installed."""
    try:
        return Libraries()
    except OSError as error:
        raise BackendError(
            f"the backend rbd needs the C libraries librbd and librados ({_NAMES[1]}, {_NAMES[0]}), which no Python "
            "package brings, nor does pip install 'ublkpool[rbd]': apt install librbd1, or dnf install librbd1"
        ) from error


def check(result: int, what: str) -> int:
    """The result of a call.  Raises `OSError`, whose text begins with `what`, for a negative errno."""
    if result < 0:
        raise OSError(-result, f"{what}: {os.strerror(-result)}")
    return result


def text(memory: Any) -> str:
    """A C string."""
    found = ffi.string(memory)
    assert isinstance(found, bytes)
    return found.decode(errors="replace")
