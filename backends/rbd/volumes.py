"""Images of a Ceph cluster as volumes: each operation is the cluster's own, at once, whatever the image's size.

A clone is of the second format: its snapshot needs no protection, and the one that a clone without `snapshot=` is made
from is removed at once; the cluster keeps it, hidden, as long as a clone needs it.
"""

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from ublkpool.backends.rbd import volume_calls
from ublkpool.backends.rbd.cluster import Cluster
from ublkpool.backends.rbd.libraries import check, ffi, libraries, text
from ublkpool.backends.rbd.options import RbdOptions
from ublkpool.bufpool.sdk.volumes import Progress, Volume, VolumeError, Volumes, whole_blocks
from ublkpool.bufpool.sizes import format_size
from ublkpool.bufpool.way_out import explain

_PATIENCE = {"client_mount_timeout": "30", "rados_mon_op_timeout": "60", "rados_osd_op_timeout": "300"}
"""In seconds: a command ends with an error where a device waits for the cluster."""
_NAMES_MAX = 64
_NAME_BYTES = 256
_SNAPSHOTS_MAX = 512


class RbdVolumeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """As `RbdOptions`; `list` needs no image."""

    pool: str
    image: str = ""
    namespace: str = ""
    snapshot: str = ""
    conf: Path | None = None
    id: str = ""


class RbdVolumes(Volumes):
    """Images of one pool and namespace."""

    kind = "rbd"
    Options = RbdVolumeOptions

    def __init__(self, options: RbdVolumeOptions) -> None:
        self._options = options
        self._lib = libraries().rbd

    def create(self, size_bytes: int) -> str:
        """See `Volumes`: with the cluster's default features, and those that the backend needs."""
        name = self._image()
        self._refuse_snapshot("create")
        with self._pool() as pool, self._image_options({}) as options:
            self._do(self._lib.rbd_create4(pool, name, whole_blocks(size_bytes), options), self._name())
        return self._pairs(self._options.image)

    def list(self) -> list[Volume]:
        """See `Volumes`."""
        with self._pool() as pool:
            found = []
            for name in self._names(pool):
                # An image may be deleted meanwhile.
                with suppress(_Missing):
                    found.append(self._described(pool, name))
        return found

    def resize(self, size_bytes: int) -> int:
        """See `Volumes`."""
        self._image()
        self._refuse_snapshot("resize")
        whole_blocks(size_bytes)
        with self._pool() as pool:
            self._refuse_users(pool)
            with self._opened(pool, self._options.image, writes=True) as image:
                before_bytes = self._size_of(image)
                if size_bytes < before_bytes:
                    raise VolumeError(
                        f"rbd: {self._name()}: has {format_size(before_bytes)} ({before_bytes} bytes), and a volume "
                        "never shrinks: its end would be lost"
                    )
                self._do(self._lib.rbd_resize2(image, size_bytes, False, ffi.NULL, ffi.NULL), self._name())
        return before_bytes

    def snapshot(self, name: str) -> str:
        """See `Volumes`; a device that serves the image goes on."""
        self._image()
        self._refuse_snapshot("snapshot")
        with self._pool() as pool, self._opened(pool, self._options.image, writes=True) as image:
            self._do(self._lib.rbd_snap_create(image, name.encode()), f"{self._name()}@{name}")
        return f"{self._pairs(self._options.image)} snapshot={name}"

    def clone(self, target: str, progress: Progress) -> str:
        """See `Volumes`: into the same pool and namespace, of `snapshot=` or of the content of now."""
        parent = self._image()
        with self._pool() as pool, self._image_options({volume_calls.CLONE_FORMAT: 2}) as options:

            def clone_of(snapshot: str) -> None:
                result = self._lib.rbd_clone3(pool, parent, snapshot.encode(), pool, target.encode(), options)
                self._do(result, self._name(target))

            if self._options.snapshot:
                self._refuse_missing_snapshot(pool)
                clone_of(self._options.snapshot)
            else:
                with self._passing_snapshot(pool, f"ublkpool-clone-{target}") as snapshot:
                    clone_of(snapshot)
        return self._pairs(target)

    def delete(self) -> None:
        """See `Volumes`: the cluster itself refuses an image that a client has open, or a clone needs."""
        name, snapshot = self._image(), self._options.snapshot
        with self._pool() as pool:
            if snapshot:
                self._refuse_missing_snapshot(pool)
                with self._opened(pool, self._options.image, writes=True) as image:
                    self._do(
                        self._lib.rbd_snap_remove(image, snapshot.encode()), f"{self._name()}@{snapshot}"
                    )
                return
            self._refuse_users(pool)
            self._refuse_needed(pool)
            self._do(self._lib.rbd_remove(pool, name), self._name())

    def _refuse_needed(self, pool: Any) -> None:
        with self._opened(pool, self._options.image) as image:
            snapshots = self._snapshots_of(image)
            has_clones = bool(self._snapshots_of(image, volume_calls.SNAPSHOT_IN_THE_TRASH))
        if has_clones:
            raise VolumeError(
                f"rbd: {self._name()}: clones need it (rbd children {self._name()}): delete them first, or make "
                "them whole with rbd flatten"
            )
        if snapshots:
            raise VolumeError(
                f"rbd: {self._name()}: has snapshots, which are deleted first: {' '.join(snapshots)}"
            )

    @contextmanager
    def _passing_snapshot(self, pool: Any, name: str) -> Iterator[str]:
        """A snapshot for the block; after it only its clones keep it."""
        with self._opened(pool, self._options.image, writes=True) as image:
            self._do(self._lib.rbd_snap_create(image, name.encode()), f"{self._name()}@{name}")
            try:
                yield name
            finally:
                self._do(self._lib.rbd_snap_remove(image, name.encode()), f"{self._name()}@{name}")

    @contextmanager
    def _pool(self) -> Iterator[Any]:
        options = self._options
        cluster = Cluster(
            RbdOptions(
                pool=options.pool,
                image=options.image,
                namespace=options.namespace,
                conf=options.conf,
                id=options.id,
            ),
            _PATIENCE,
        )
        try:
            yield cluster.pool
        finally:
            cluster.close()

    @contextmanager
    def _opened(self, pool: Any, image: str, *, writes: bool = False) -> Iterator[Any]:
        """An open image; one that is only read is not counted among its users."""
        out = ffi.new("rbd_image_t *")
        opening = self._lib.rbd_open if writes else self._lib.rbd_open_read_only
        self._do(opening(pool, image.encode(), out, ffi.NULL), self._name(image))
        try:
            yield out[0]
        finally:
            self._lib.rbd_close(out[0])

    @contextmanager
    def _image_options(self, values: Mapping[int, int]) -> Iterator[Any]:
        out = ffi.new("rbd_image_options_t *")
        self._lib.rbd_image_options_create(out)
        try:
            for key, value in {
                volume_calls.FEATURES_TO_SET: volume_calls.LAYERING_AND_LOCK,
                **values,
            }.items():
                check(self._lib.rbd_image_options_set_uint64(out[0], key, value), "image options")
            yield out[0]
        finally:
            self._lib.rbd_image_options_destroy(out[0])

    def _names(self, pool: Any) -> Sequence[str]:
        count = ffi.new("size_t *", _NAMES_MAX)
        while True:
            found = ffi.new("rbd_image_spec_t[]", count[0])
            result = self._lib.rbd_list2(pool, found, count)
            if result != -errno.ERANGE:
                break
        self._do(result, f"pool={self._options.pool}")
        try:
            return sorted(text(found[i].name) for i in range(count[0]))
        finally:
            self._lib.rbd_image_spec_list_cleanup(found, count[0])

    def _described(self, pool: Any, name: str) -> Volume:
        with self._opened(pool, name) as image:
            return Volume(
                name=name,
                size_bytes=self._size_of(image),
                parent=self._parent_of(image),
                snapshots=tuple(self._snapshots_of(image)),
                users=tuple(self._watchers_of(image)),
            )

    def _size_of(self, image: Any) -> int:
        size = ffi.new("uint64_t *")
        self._do(self._lib.rbd_get_size(image, size), self._name())
        return int(size[0])

    def _parent_of(self, image: Any) -> str:
        pool, name, snapshot = (ffi.new("char[]", _NAME_BYTES) for _ in range(3))
        result = self._lib.rbd_get_parent_info(
            image, pool, _NAME_BYTES, name, _NAME_BYTES, snapshot, _NAME_BYTES
        )
        if result == -errno.ENOENT:
            return ""
        self._do(result, self._name())
        return f"{text(pool)}/{text(name)}@{text(snapshot)}"

    def _snapshots_of(self, image: Any, of_type: int = volume_calls.SNAPSHOT_OF_A_USER) -> Sequence[str]:
        count = ffi.new("int *", _SNAPSHOTS_MAX)
        found = ffi.new("rbd_snap_info_t[]", _SNAPSHOTS_MAX)
        number = self._do(self._lib.rbd_snap_list(image, found, count), self._name())
        try:
            return [text(found[i].name) for i in range(number) if self._type(image, found[i].id) == of_type]
        finally:
            self._lib.rbd_snap_list_end(found)

    def _type(self, image: Any, snapshot_id: int) -> int:
        out = ffi.new("int *")
        self._do(self._lib.rbd_snap_get_namespace_type(image, snapshot_id, out), self._name())
        return int(out[0])

    def _watchers_of(self, image: Any) -> Sequence[str]:
        count = ffi.new("size_t *", _NAMES_MAX)
        found = ffi.new("rbd_image_watcher_t[]", _NAMES_MAX)
        self._do(self._lib.rbd_watchers_list(image, found, count), self._name())
        try:
            return [f"client.{found[i].id} at {text(found[i].addr)}" for i in range(count[0])]
        finally:
            self._lib.rbd_watchers_list_cleanup(found, count[0])

    def _refuse_users(self, pool: Any) -> None:
        with self._opened(pool, self._options.image) as image:
            if users := self._watchers_of(image):
                raise self._in_use(", ".join(users))

    def _refuse_missing_snapshot(self, pool: Any) -> None:
        with self._opened(pool, self._options.image) as image:
            found = self._snapshots_of(image)
        if self._options.snapshot not in found:
            raise VolumeError(
                f"rbd: {self._name()}: no snapshot {self._options.snapshot}; it has: {' '.join(found) or 'none'}"
            )

    def _in_use(self, who: str) -> VolumeError:
        return VolumeError(
            f"rbd: {self._name()}: in use by {who}: end that first (`ublkpool del` if it serves a device; `ublkpool "
            "resize` grows a live one); a client that was killed counts for 30 s more"
        )

    def _do(self, result: int, name: str) -> int:
        """The result.  Raises `VolumeError` that names the volume."""
        if result >= 0:
            return result
        match -result:
            case errno.EEXIST:
                raise VolumeError(
                    f"rbd: {name}: exists already: choose another name, or delete that one first"
                )
            case errno.ENOENT:
                raise _Missing(f"rbd: {name}: no such image")
            case errno.EBUSY:
                raise self._in_use("a client, or a clone of it (rbd children, rbd flatten)")
            case errno.ENOTEMPTY:
                raise VolumeError(
                    f"rbd: {name}: has snapshots that clones need: delete or flatten those first"
                )
            case errno.EROFS:
                raise self._in_use("a client that has its lock")
        raise VolumeError(f"rbd: {name}: {explain(OSError(-result, os.strerror(-result)))}")

    def _name(self, image: str = "") -> str:
        options = self._options
        return "/".join(each for each in (options.pool, options.namespace, image or options.image) if each)

    def _pairs(self, image: str) -> str:
        values = {key: getattr(self._options, key) for key in ("pool", "namespace", "conf", "id")}
        return " ".join(f"{key}={value}" for key, value in ({**values, "image": image}).items() if value)

    def _image(self) -> bytes:
        if not self._options.image:
            raise VolumeError("rbd: option image is missing: which image of the pool")
        return self._options.image.encode()

    def _refuse_snapshot(self, what: str) -> None:
        if self._options.snapshot:
            raise VolumeError(
                f"rbd: snapshot={self._options.snapshot}: {what} is for an image, not for a snapshot"
            )


class _Missing(VolumeError):
    """There is no such image."""
