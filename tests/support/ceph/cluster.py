"""A Ceph cluster for tests: monitors and OSDs as plain processes, with everything in one directory.

As a class for fixtures, and by `python -m support.ceph` (see __main__.py).  cephx is on; the network is the loopback,
or a network namespace whose link can be cut; no systemd, no mgr, and no root but for that namespace.  An OSD keeps its
data in its memory (`memstore`, the faster start; it is empty after `kill` and `revive`) or in a sparse file
(`bluestore`).

In the directory: the file for clients (`conf`), `keyring` (every key, so that `conf=` and `id=` are all that a client
needs), the data and logs of the servers.  `stop` ends every process by its pid and removes the directory.
"""

import json
import shutil
import subprocess
import sys
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from support.ceph.keyring import keyring_entry, new_key
from support.ceph.network import Network, OtherHost, cut, heal
from support.ceph.programs import library_settings, program
from support.ceph.servers import Servers
from support.sources.ports import HeldPort

POOL = "rbd"
CLIENT = "ublkpool"
CLIENT_CAPS = {"mon": "profile rbd", "osd": f"profile rbd pool={POOL}"}
"""The caps that a client of ours needs."""
_COMMAND_S = 150.0
_FILLER_BYTES = 8 << 20
_ADMIN = {"mon": "allow *", "osd": "allow *", "mgr": "allow *"}


@dataclass(frozen=True)
class Shape:
    """What a cluster is made of; kept in its directory for later commands."""

    stores: tuple[str, ...] = ("memstore", "memstore", "memstore")
    """For each OSD `memstore` or `bluestore`."""
    monitors: int = 1
    replicas: int = 2
    store_bytes: int = 1 << 30
    """How much an OSD has room for."""
    network: bool = False
    """Whether the servers have a network namespace of their own, for `cut` and `heal`; needs root."""
    settings: dict[str, str] = field(default_factory=dict)
    """More lines for [global] of ceph.conf."""


class Cluster:
    """A cluster; as a context manager it is started, and stopped at the end."""

    def __init__(self, directory: Path, shape: Shape = Shape(), *, outlive_us: bool = False) -> None:
        self.directory = directory.absolute()
        self.shape = shape
        self._network = Network(network_name(self.directory)) if shape.network else None
        self._prefix = self._network.prefix if self._network else ()
        self.servers = Servers(self.directory, self._prefix, outlive_us=outlive_us)
        self._held: list[HeldPort] = []
        self.monitor_addresses: list[str] = []
        """From `start` on."""

    @classmethod
    def found_in(cls, directory: Path) -> Self:
        """The cluster that another process has started in a directory."""
        shape = json.loads((directory / "shape.json").read_text())
        return cls(directory, Shape(**{**shape, "stores": tuple(shape["stores"])}), outlive_us=True)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def conf(self) -> Path:
        """The file for a client's `conf=`."""
        return self.directory / "ceph.conf"

    @property
    def monitor_names(self) -> list[str]:
        """`mon.a` and so on."""
        return [f"mon.{chr(ord('a') + number)}" for number in range(self.shape.monitors)]

    @property
    def osd_names(self) -> list[str]:
        """`osd.0` and so on."""
        return [f"osd.{number}" for number in range(len(self.shape.stores))]

    def start(self) -> None:
        """Make the cluster and its pool; returns when every OSD is up."""
        self.directory.mkdir(parents=True)
        (self.directory / "shape.json").write_text(json.dumps(asdict(self.shape)))
        if self._network is not None:
            self._network.make()
        self._write_conf()
        self._write_keyring()
        self._make_monitors()
        for name in self.monitor_names:
            self.servers.start(name, *self._config())
        self._at_once([self._make_osd_command(name) for name in self.osd_names])
        for name in self.osd_names:
            self.servers.start(name, *self._config())
        pool: list[dict[str, Any]] = [
            {"prefix": "osd pool create", "pool": POOL, "pg_num": 4, "size": self.shape.replicas},
            {"prefix": "osd pool application enable", "pool": POOL, "app": "rbd"},
        ]
        self._ask(pool, "--until-up", str(len(self.shape.stores)))

    def stop(self) -> None:
        """End every server and remove the directory."""
        self.servers.end()
        if self._network is not None:
            self._network.remove()
        for port in self._held:
            port.close()
        self._held.clear()
        shutil.rmtree(self.directory, ignore_errors=True)

    def kill(self, name: str) -> None:
        """`kill -9` of `osd.1` or `mon.a`."""
        self.servers.kill(name)

    def revive(self, name: str) -> None:
        """Start a killed server again, an OSD in memory as an empty one; returns before it is up."""
        kind, _, number = name.partition(".")
        if kind == "osd" and self.shape.stores[int(number)] == "memstore":
            shutil.rmtree(self.directory / name)
            self._at_once([self._make_osd_command(name)])
        self.servers.start(name, *self._config())

    @contextmanager
    def paused(self, name: str) -> Iterator[None]:
        """A server that does nothing meanwhile: slow, and not dead, until the others miss its heartbeats."""
        self.servers.pause(name)
        try:
            yield
        finally:
            self.servers.resume(name)

    def cut(self) -> None:
        """Cut the servers off from this side; among themselves they are joined."""
        cut(network_name(self.directory))

    def heal(self) -> None:
        """Join them again."""
        heal(network_name(self.directory))

    def host(self, number: int) -> OtherHost:
        """Another host beside this one, with a link of its own to the servers, which have a network of theirs."""
        assert self._network is not None
        return OtherHost(self._network, number)

    def fill(self) -> None:
        """Let the cluster count as full: by some data, and a low bound for it; returns when it does."""
        self.rados("put", "-p", POOL, "filler", "-", text="f" * _FILLER_BYTES)
        self._set_full_ratio(_FILLER_BYTES / self.shape.store_bytes / 2)
        deadline_s = time.monotonic() + _COMMAND_S
        while "full osd" not in self.commands({"prefix": "health"})[0]:
            if time.monotonic() > deadline_s:
                raise ClusterError("the cluster does not count as full")
            time.sleep(0.1)

    def make_room(self) -> None:
        """Let it have room again, as much as it had at the beginning."""
        self._set_full_ratio(0.95)
        self.rados("rm", "-p", POOL, "filler")

    def _set_full_ratio(self, full: float) -> None:
        ratios = {"full": full, "backfillfull": full * 0.9, "nearfull": full * 0.8}
        self.commands(
            *({"prefix": f"osd set-{name}-ratio", "ratio": ratio} for name, ratio in ratios.items())
        )

    def wait_until_up(self, count: int) -> None:
        """Wait until exactly as many OSDs are up for the monitors."""
        self._ask([], "--until-up", str(count))

    def command(self, prefix: str, **arguments: Any) -> Any:
        """One command for the monitors, such as `osd set` with key="full"; returns its answer, from JSON."""
        return self.commands({"prefix": prefix, "format": "json", **arguments})[0]

    def commands(self, *commands: Mapping[str, Any]) -> list[Any]:
        """Several commands in one go."""
        return self._ask(commands)

    def _ask(self, commands: Sequence[Mapping[str, Any]], *wait: str) -> list[Any]:
        script = str(Path(__file__).with_name("mon_commands.py"))
        asked = [*self._prefix, sys.executable, script, str(self.conf), *wait]
        answers: list[Any] = json.loads(self._run(asked, text=json.dumps(commands)))
        return answers

    def add_client(self, name: str, caps: Mapping[str, str]) -> None:
        """Make client.NAME with rights of its own; `id=NAME` then finds its key."""
        rights = [text for pair in caps.items() for text in pair]
        self.command("auth get-or-create", entity=f"client.{name}", caps=rights)
        key = self.command("auth get-key", entity=f"client.{name}")["key"]
        with (self.directory / "keyring").open("a") as keyring:
            keyring.write(keyring_entry(f"client.{name}", key, {}))

    def rbd(self, *arguments: str, client: str = "admin", text: str | None = None) -> str:
        """Run Ceph's own `rbd`; returns what it prints."""
        return self._run([program("rbd"), *self._config(), "--id", client, *arguments], text=text)

    def rados(self, *arguments: str, client: str = "admin", text: str | None = None) -> str:
        """Run Ceph's own `rados`; returns what it prints."""
        return self._run([program("rados"), *self._config(), "--id", client, *arguments], text=text)

    def _config(self) -> list[str]:
        return ["-c", str(self.conf)]

    def _write_conf(self) -> None:
        here = self.directory
        address = self._network.address if self._network else "127.0.0.1"
        if self._network is None:
            self._held = [HeldPort() for _ in self.monitor_names]
        ports = [each.number for each in self._held] or range(3300, 3300 + self.shape.monitors)
        self.monitor_addresses = [f"v2:{address}:{port}" for port in ports]
        settings = {
            "fsid": str(uuid.uuid4()),
            "mon_host": ",".join(self.monitor_addresses),
            "public_addr": address,
            "auth_cluster_required": "cephx",
            "auth_service_required": "cephx",
            "auth_client_required": "cephx",
            "auth_allow_insecure_global_id_reclaim": "false",
            "keyring": str(here / "keyring"),
            "run_dir": str(here),
            "crash_dir": str(here),
            "admin_socket": "",
            "log_to_stderr": "false",
            "osd_pool_default_size": str(self.shape.replicas),
            "osd_pool_default_min_size": "1",
            "osd_pool_default_pg_autoscale_mode": "off",
            "osd_crush_chooseleaf_type": "0",
            **library_settings(),
            **(_NO_READ_LEASE if self.shape.replicas == 1 else {}),
            **self.shape.settings,
        }
        self.conf.write_text(
            _section("global", settings)
            + _section("mon", _MONITOR | {"mon_data": f"{here}/$name", "log_file": f"{here}/$name.log"})
            + _section("osd", _OSD | {"osd_data": f"{here}/$name", "log_file": f"{here}/$name.log"})
            + _section("osd", {key: str(self.shape.store_bytes) for key in _STORE_SIZES})
        )

    def _write_keyring(self) -> None:
        caps = {"mon.": {"mon": "allow *"}, "client.admin": _ADMIN, f"client.{CLIENT}": CLIENT_CAPS}
        caps |= {name: {"mon": "allow profile osd", "osd": "allow *"} for name in self.osd_names}
        path = self.directory / "keyring"
        path.touch(mode=0o600)
        path.write_text("".join(keyring_entry(name, new_key(), rights) for name, rights in caps.items()))

    def _make_monitors(self) -> None:
        monmap, osdmap = str(self.directory / "monmap"), str(self.directory / "osdmap")
        fsid = self.conf.read_text().partition("fsid = ")[2].partition("\n")[0]
        places = []
        for name, address in zip(self.monitor_names, self.monitor_addresses, strict=True):
            places += ["--addv", name.removeprefix("mon."), address]
        self._run([program("monmaptool"), "--create", "--fsid", fsid, *places, monmap])
        # The OSDs are known from the start: that saves a command for each.
        count = str(len(self.shape.stores))
        self._run([program("osdmaptool"), *self._config(), osdmap, "--createsimple", count])
        made = [
            "--mkfs",
            "--monmap",
            monmap,
            "--osdmap",
            osdmap,
            "--keyring",
            str(self.directory / "keyring"),
        ]
        self._at_once(
            [
                [program("ceph-mon"), *self._config(), "-i", name.removeprefix("mon."), *made]
                for name in self.monitor_names
            ]
        )

    def _make_osd_command(self, name: str) -> list[str]:
        number = name.removeprefix("osd.")
        (self.directory / name).mkdir()
        store = ["--osd-objectstore", self.shape.stores[int(number)]]
        # The same each time: the monitors take an OSD with another for a foreign one.
        identity = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{self.directory}/{name}"))
        made = ["-i", number, "--mkfs", "--osd-uuid", identity]
        return [*self._prefix, program("ceph-osd"), *self._config(), *store, *made]

    def _at_once(self, commands: Sequence[Sequence[str]]) -> None:
        with ThreadPoolExecutor(len(commands)) as threads:
            list(threads.map(self._run, commands))

    def _run(self, command: Sequence[str], text: str | None = None) -> str:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=_COMMAND_S)
        if done.returncode:
            raise ClusterError(f"{' '.join(command)}: status {done.returncode}: {done.stderr.strip()}")
        return done.stdout


def network_name(directory: Path) -> str:
    """The name of the namespace of the cluster in a directory."""
    return f"ceph{zlib.crc32(bytes(directory.absolute())):08x}"


class ClusterError(Exception):
    """One of Ceph's programs failed."""


_MONITOR = {
    "mon_allow_pool_delete": "true",
    "mon_data_avail_crit": "0",
    "mon_data_avail_warn": "0",
    "mon_osd_min_down_reporters": "1",
    "mon_osd_reporter_subtree_level": "osd",
    # Each change of the cluster's maps waits for this long.
    "paxos_propose_interval": "0.05",
}
_OSD = {
    "bluestore_block_create": "true",
    "bluestore_block_preallocate_file": "false",
    "bluestore_cache_size": str(64 << 20),
    "osd_class_load_list": "*",
    "osd_class_default_list": "*",
    "osd_crush_update_on_start": "false",
    "osd_heartbeat_grace": "6",
    "osd_heartbeat_interval": "1",
}
# Ceph 16 never again serves reads that came after the lease had run out, as in a pause, of a pool whose OSD has no
# peer to renew it with (tracker.ceph.com/issues/53806).  The lease keeps a second OSD waiting, and there is none.
_NO_READ_LEASE = {"osd_pool_default_read_lease_ratio": "10000"}
_STORE_SIZES = ("bluestore_block_size", "memstore_device_bytes")


def _section(name: str, settings: Mapping[str, str]) -> str:
    return f"[{name}]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items())
