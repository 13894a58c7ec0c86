"""The connection to a cluster, and one pool of it.

Owns the rados handles.  Its calls wait for the cluster as long as that takes, and may be made by any thread.
"""

import errno
from collections.abc import Mapping
from typing import Any, Protocol

from ublkpool.backends.rbd.libraries import check, ffi, libraries, text
from ublkpool.backends.rbd.options import RbdOptions
from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.way_out import explain

_EXPIRE = "mon_osd_blocklist_default_expire"
SETTINGS = {
    # An answered write must be outside this process.
    "rbd_cache": "false",
    "rbd_persistent_cache_mode": "disabled",
    # A predecessor whose lock is broken must write no more.
    "rbd_blocklist_on_break_lock": "true",
    # Data in the pool and in the own segment does not change until its write is answered; the engine copies the rest.
    "rbd_disable_zero_copy_writes": "false",
}
"""Settings of librbd on which the promises of this backend rest; an image or a pool may not set them otherwise."""
_LIMITS = {
    # Else a full throttle makes the engine's thread wait for answers that it has to hear itself.
    "objecter_inflight_ops": "0",
    "objecter_inflight_op_bytes": "0",
}
LEAN = {
    # librbd hands each request from thread to thread.  The engine's thread never waits in librbd (see _LIMITS) and so
    # needs none to submit for it; of several threads for answers each is in the way of the others.
    "rbd_non_blocking_aio": "false",
    "librados_thread_count": "1",
    # "simple" delays a write to an object with a write under way, to join adjacent ones: the kernel has done so.
    "rbd_io_scheduler": "none",
}
"""Instead of Ceph's own defaults, for a client with one image: they cost time in every request."""
_VALUE_BYTES = 256


class Question(Protocol):
    """A question to the cluster that may stay unanswered."""

    def answer(self) -> int | None:
        """0, a negative errno, or None while there is no answer."""

    def close(self) -> None:
        """Give the question up."""


class Cluster:
    """A connection with one pool."""

    def __init__(
        self,
        options: RbdOptions,
        settings: Mapping[str, str] | None = None,
        defaults: Mapping[str, str] | None = None,
    ) -> None:
        """Connect.  Raises `BackendError` that names the option or file.

        `settings` are more settings of librados; `defaults` are for settings that neither the configuration nor the
        cluster has.
        """
        self._settings = {**SETTINGS, **_LIMITS, **(settings or {})}
        self._defaults = dict(defaults or {})
        self._lib = libraries().rados
        self._options = options
        self._handle: Any = None
        self.pool: Any = None
        """The pool, with its namespace."""
        try:
            self._handle = self._created()
            self._connect()
            self.pool = self._opened_pool()
        except BaseException:
            self.close()
            raise

    def _created(self) -> Any:
        out, options = ffi.new("rados_t *"), self._options
        check(self._lib.rados_create(out, options.id.encode() if options.id else ffi.NULL), "rbd: librados")
        return out[0]

    def _connect(self) -> None:
        lib, conf = self._lib, self._options.conf
        self._set_defaults()
        path = bytes(conf.absolute()) if conf is not None else ffi.NULL
        try:
            check(lib.rados_conf_read_file(self._handle, path), "configuration")
        except OSError as error:
            where = (
                f"conf={conf}" if conf is not None else "conf= is not given and /etc/ceph/ceph.conf not there"
            )
            raise BackendError(f"rbd: {where}: {explain(error)}") from error
        lib.rados_conf_parse_env(self._handle, ffi.NULL)
        for key, value in self._settings.items():
            # A library that does not know a setting has nothing to be set.
            lib.rados_conf_set(self._handle, key.encode(), value.encode())
        try:
            check(lib.rados_connect(self._handle), "cannot connect")
        except OSError as error:
            user = f"client.{self._options.id or 'admin'}"
            raise BackendError(
                f"rbd: the cluster is not reached as {user}: {explain(error)}: check conf=, id= and the keyring"
            ) from error

    def _set_defaults(self) -> None:
        """The way Ceph's programs are told on their command line; a library ignores what it does not know."""
        words = ["ublkpool", *(f"--default-{key}={value}" for key, value in self._defaults.items())]
        memory = [ffi.new("char[]", each.encode()) for each in words]
        self._lib.rados_conf_parse_argv(self._handle, len(memory), ffi.new("const char *[]", memory))

    def _opened_pool(self) -> Any:
        out, options = ffi.new("rados_ioctx_t *"), self._options
        result = self._lib.rados_ioctx_create(self._handle, options.pool.encode(), out)
        if result == -errno.ENOENT:
            raise BackendError(f"rbd: pool={options.pool}: the cluster has no such pool")
        try:
            check(result, f"pool={options.pool}")
        except OSError as error:
            raise BackendError(f"rbd: {explain(error)}") from error
        self._lib.rados_ioctx_set_namespace(out[0], options.namespace.encode())
        return out[0]

    @property
    def fsid(self) -> str:
        """Identifies the cluster.  Raises `OSError`."""
        memory = ffi.new("char[]", _VALUE_BYTES)
        check(self._lib.rados_cluster_fsid(self._handle, memory, _VALUE_BYTES), "fsid")
        return text(memory)

    @property
    def client_id(self) -> int:
        """Identifies this client in its cluster."""
        return int(self._lib.rados_get_instance_id(self._handle))

    @property
    def pool_id(self) -> int:
        """Identifies the pool in its cluster."""
        return int(self._lib.rados_ioctx_get_id(self.pool))

    @property
    def expire_s(self) -> float:
        """For how many seconds the cluster excludes a client whose lock was broken."""
        return float(self._options.blocklist_expire or self.setting(_EXPIRE))

    def setting(self, key: str) -> str:
        """The value that a setting has for this client.  Raises `OSError`."""
        memory = ffi.new("char[]", _VALUE_BYTES)
        check(self._lib.rados_conf_get(self._handle, key.encode(), memory, _VALUE_BYTES), key)
        return text(memory)

    def ask(self, name: str) -> Question:
        """Ask for the object's size, of which only the answer's arrival matters.  Raises `OSError`."""
        return _Stat(self._lib, self.pool, name)

    def close(self) -> None:
        """Leave the cluster."""
        if self.pool is not None:
            self._lib.rados_ioctx_destroy(self.pool)
            self.pool = None
        if self._handle is not None:
            self._lib.rados_shutdown(self._handle)
            self._handle = None


class _Stat:
    """See `Cluster.ask`."""

    def __init__(self, lib: Any, pool: Any, name: str) -> None:
        self._lib = lib
        self._size, self._mtime = ffi.new("uint64_t *"), ffi.new("long *")
        out = ffi.new("rados_completion_t *")
        check(lib.rados_aio_create_completion2(ffi.NULL, ffi.NULL, out), "rados")
        self._completion = out[0]
        check(lib.rados_aio_stat(pool, name.encode(), out[0], self._size, self._mtime), "rados")

    def answer(self) -> int | None:
        """See `Question`."""
        if not self._lib.rados_aio_is_complete(self._completion):
            return None
        return int(self._lib.rados_aio_get_return_value(self._completion))

    def close(self) -> None:
        """See `Question`.  An answer that may still come needs the memory for it."""
        if self.answer() is None:
            _given_up.append(self)
        else:
            self._lib.rados_aio_release(self._completion)


_given_up: list[_Stat] = []
