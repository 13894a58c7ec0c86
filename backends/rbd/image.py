"""An open image: its facts, its lock, its growth.

Owns the librbd handle.  Its calls wait for the cluster as long as that takes, and may be made by any thread.
"""

import errno
from collections.abc import Callable
from typing import Any

from ublkpool.backends.rbd.cluster import SETTINGS, Cluster
from ublkpool.backends.rbd.libraries import check, ffi, libraries, text
from ublkpool.backends.rbd.options import RbdOptions
from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.way_out import explain

_EXCLUSIVE = 0
_EXCLUSIVE_LOCK = 1 << 2
"""RBD_FEATURE_EXCLUSIVE_LOCK."""
_NAMES_MAX = 64
_SETTINGS_MAX = 512
_VALUE_BYTES = 256


class Image:
    """An image, or one of its snapshots."""

    def __init__(self, cluster: Cluster, options: RbdOptions) -> None:
        """Open it.  Raises `BackendError` that names the image and the way out."""
        self._lib, self._options = libraries().rbd, options
        self._client_id = cluster.client_id
        self._handle: Any = None
        self._callback: Any = None
        out = ffi.new("rbd_image_t *")
        opening = self._lib.rbd_open_read_only if options.is_read_only else self._lib.rbd_open
        snapshot = options.snapshot.encode() if options.snapshot else ffi.NULL
        result = opening(cluster.pool, options.image.encode(), out, snapshot)
        if result == -errno.ENOENT:
            raise BackendError(self._missing())
        try:
            check(result, options.name)
        except OSError as error:
            raise BackendError(f"rbd: {explain(error)}") from error
        self._handle = out[0]

    def _missing(self) -> str:
        options = self._options
        if options.snapshot:
            return f"rbd: {options.name}: no such snapshot or image"
        given = {"pool": options.pool, "namespace": options.namespace, "image": options.image}
        given |= {"conf": str(options.conf or ""), "id": options.id}
        words = " ".join(f"{key}={value}" for key, value in given.items() if value)
        return (
            f"rbd: {options.name}: no such image, and a start makes none: "
            f"ublkpool volume create rbd {words} --size SIZE"
        )

    @property
    def address(self) -> int:
        """The handle, for the native engine."""
        return int(ffi.cast("uintptr_t", self._handle))

    @property
    def id(self) -> str:
        """Identifies the image in its pool, whatever its name is.  Raises `OSError`."""
        memory = ffi.new("char[]", _VALUE_BYTES)
        check(self._lib.rbd_get_id(self._handle, memory, _VALUE_BYTES), "id")
        return text(memory)

    @property
    def size_bytes(self) -> int:
        """Its size now.  Raises `OSError`."""
        size = ffi.new("uint64_t *")
        check(self._lib.rbd_get_size(self._handle, size), "size")
        return int(size[0])

    @property
    def object_bytes(self) -> int:
        """The size of its objects.  Raises `OSError`."""
        info: Any = ffi.new("rbd_image_info_t *")
        check(self._lib.rbd_stat(self._handle, info, ffi.sizeof("rbd_image_info_t")), "object size")
        return int(info.obj_size)

    @property
    def has_lock_feature(self) -> bool:
        """Whether it has the feature exclusive-lock.  Raises `OSError`."""
        features = ffi.new("uint64_t *")
        check(self._lib.rbd_get_features(self._handle, features), "features")
        return bool(features[0] & _EXCLUSIVE_LOCK)

    def wrong_setting(self) -> str:
        """A setting, in words, that the image or its pool has otherwise than `SETTINGS`; empty: none."""
        count = ffi.new("int *", _SETTINGS_MAX)
        found = ffi.new("rbd_config_option_t[]", _SETTINGS_MAX)
        check(self._lib.rbd_config_image_list(self._handle, found, count), "settings")
        try:
            values = {text(found[i].name): text(found[i].value) for i in range(count[0])}
        finally:
            self._lib.rbd_config_image_list_cleanup(found, count[0])
        wrong = [
            f"{key} = {values[key]}" for key, value in SETTINGS.items() if values.get(key, value) != value
        ]
        return wrong[0] if wrong else ""

    def lock_owners(self) -> list[str]:
        """The addresses of the clients that have its lock.  Raises `OSError`."""
        mode, count = ffi.new("int *"), ffi.new("size_t *", _NAMES_MAX)
        owners = ffi.new("char *[]", _NAMES_MAX)
        result = self._lib.rbd_lock_get_owners(self._handle, mode, owners, count)
        if result == -errno.ENOENT:
            return []
        check(result, "lock")
        try:
            return [text(owners[i]) for i in range(count[0])]
        finally:
            self._lib.rbd_lock_get_owners_cleanup(owners, count[0])

    def watchers(self) -> list[str]:
        """The addresses of the clients that have it open; a dead one stays for half a minute.  Raises `OSError`."""
        return [address for _, address in self._watchers()]

    @property
    def own_address(self) -> str:
        """The address of this client; empty if the cluster does not list it.  Raises `OSError`."""
        return next((address for number, address in self._watchers() if number == self._client_id), "")

    def _watchers(self) -> list[tuple[int, str]]:
        count = ffi.new("size_t *", _NAMES_MAX)
        found = ffi.new("rbd_image_watcher_t[]", _NAMES_MAX)
        check(self._lib.rbd_watchers_list(self._handle, found, count), "watchers")
        try:
            return [(int(found[i].id), text(found[i].addr)) for i in range(count[0])]
        finally:
            self._lib.rbd_watchers_list_cleanup(found, count[0])

    def acquire_lock(self) -> None:
        """Take its lock and keep it, also if another client asks for it.  Raises `OSError`."""
        check(self._lib.rbd_lock_acquire(self._handle, _EXCLUSIVE), "lock")

    def break_lock(self, owner: str) -> None:
        """Exclude this client from the cluster and end its lock.  Raises `OSError` if another has the lock by now."""
        check(self._lib.rbd_lock_break(self._handle, _EXCLUSIVE, owner.encode()), "lock")

    def resize(self, size_bytes: int) -> None:
        """Make it larger.  Raises `OSError`."""
        check(self._lib.rbd_resize2(self._handle, size_bytes, False, ffi.NULL, ffi.NULL), "resize")

    def metadata(self, key: str) -> str:
        """What is on record in the image under this key; empty: nothing.  Raises `OSError`."""
        memory, size = ffi.new("char[]", _VALUE_BYTES), ffi.new("size_t *", _VALUE_BYTES)
        result = self._lib.rbd_metadata_get(self._handle, key.encode(), memory, size)
        if result == -errno.ENOENT:
            return ""
        check(result, key)
        return text(memory)

    def set_metadata(self, key: str, value: str) -> None:
        """Put something on record in the image.  Raises `OSError`."""
        check(self._lib.rbd_metadata_set(self._handle, key.encode(), value.encode()), key)

    def watch(self, changed: Callable[[], None]) -> None:
        """Have `changed` called, on a thread of librbd's, which must not wait, when the image changes."""
        self._callback = ffi.callback("rbd_update_callback_t", lambda _: changed())
        handle = ffi.new("uint64_t *")
        check(self._lib.rbd_update_watch(self._handle, handle, self._callback, ffi.NULL), "watch")

    def close(self) -> None:
        """Close it, and with it give its lock back.  Waits for what the cluster has not answered."""
        if self._handle is not None:
            self._lib.rbd_close(self._handle)
            self._handle = None
