"""The options of the backend rbd."""

from pathlib import Path

import msgspec

from ublkpool.bufpool.errors import BackendError


class RbdOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Which image; docs/BACKENDS.md has the table.

    `blocklist_expire` is for how many seconds the cluster excludes a client whose lock was broken; 0: what the
    configuration says, `mon_osd_blocklist_default_expire`.  `ceph_defaults` leaves settings that no user has set as
    Ceph's libraries have them.
    """

    pool: str
    image: str
    namespace: str = ""
    snapshot: str = ""
    conf: Path | None = None
    id: str = ""
    readonly: bool = False
    blocklist_expire: int = 0
    ceph_defaults: bool = False

    @property
    def name(self) -> str:
        """The image for people, as the command rbd writes it."""
        parts = [each for each in (self.pool, self.namespace, self.image) if each]
        return "/".join(parts) + (f"@{self.snapshot}" if self.snapshot else "")

    @property
    def is_read_only(self) -> bool:
        """Whether nothing is written: a snapshot never changes."""
        return self.readonly or bool(self.snapshot)


def check_options(options: RbdOptions) -> None:
    """Raise `BackendError` for options that no image can have."""
    for key, value in (("pool", options.pool), ("image", options.image)):
        if not value:
            raise BackendError(f"rbd: {key}= is empty: give pool=POOL image=IMAGE")
    if options.blocklist_expire < 0:
        raise BackendError(f"rbd: blocklist_expire={options.blocklist_expire} is not a number of seconds")
