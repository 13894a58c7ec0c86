"""CONF [--until-up COUNT]: send the monitors a JSON list of commands from stdin, print the answers.

With --until-up it then waits until exactly as many OSDs are up.

    python -m support.ceph.mon_commands /tmp/c/ceph.conf <<< '[{"prefix": "osd stat", "format": "json"}]'

A process of its own, because librados starts threads and a test that forks must have none.  Without Ceph's own `ceph`,
whose start takes longer than all of this.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cffi import FFI

_DEADLINE_S = 120.0
_CDEF = """
int rados_create2(void **cluster, const char *name, const char *user, uint64_t flags);
int rados_conf_read_file(void *cluster, const char *path);
int rados_conf_set(void *cluster, const char *option, const char *value);
int rados_connect(void *cluster);
void rados_shutdown(void *cluster);
int rados_mon_command(void *cluster, const char **commands, size_t count, const char *in, size_t in_bytes,
    char **out, size_t *out_bytes, char **message, size_t *message_bytes);
void rados_buffer_free(char *buffer);
"""


class CommandFailed(Exception):
    """The monitors refused a command."""


class Monitors:
    """A connection as client.admin."""

    def __init__(self, conf: str) -> None:
        self._ffi = FFI()
        self._ffi.cdef(_CDEF)
        rados: Any = self._ffi.dlopen("librados.so.2")
        self._rados = rados
        handle = self._ffi.new("void **")
        self._check("create", self._rados.rados_create2(handle, b"ceph", b"client.admin", 0))
        self._cluster = handle[0]
        self._check(conf, self._rados.rados_conf_read_file(self._cluster, conf.encode()))
        for option in (b"client_mount_timeout", b"rados_mon_op_timeout"):
            self._rados.rados_conf_set(self._cluster, option, str(int(_DEADLINE_S)).encode())
        self._check("connect", self._rados.rados_connect(self._cluster))

    def close(self) -> None:
        """Disconnect."""
        self._rados.rados_shutdown(self._cluster)

    def command(self, command: dict[str, Any]) -> Any:
        """Send one command; returns its answer, parsed if it is JSON."""
        text = self._ffi.new("char[]", json.dumps(command).encode())
        texts = self._ffi.new("const char *[]", [text])
        out, message = self._ffi.new("char **"), self._ffi.new("char **")
        sizes = self._ffi.new("size_t[2]")
        send = self._rados.rados_mon_command
        status = send(self._cluster, texts, 1, b"", 0, out, sizes, message, sizes + 1)
        answer, said = self._taken(out[0], sizes[0]), self._taken(message[0], sizes[1])
        self._check(f"{command['prefix']}: {said}", status)
        return json.loads(answer) if command.get("format") == "json" else answer

    def wait_until_up(self, count: int) -> None:
        """Wait until as many OSDs are up."""
        deadline_s = time.monotonic() + _DEADLINE_S
        while (up := self.command({"prefix": "osd stat", "format": "json"})["num_up_osds"]) != count:
            if time.monotonic() > deadline_s:
                raise CommandFailed(f"{up} OSDs are up, not {count}")
            time.sleep(0.02)

    def _taken(self, buffer: Any, size: int) -> str:
        if buffer == self._ffi.NULL:
            return ""
        text = bytes(self._ffi.buffer(buffer, size)).decode()
        self._rados.rados_buffer_free(buffer)
        return text

    @staticmethod
    def _check(what: str, status: int) -> None:
        if status < 0:
            raise CommandFailed(f"{what}: error {-status}")


@contextmanager
def _connected(conf: str) -> Iterator[Monitors]:
    monitors = Monitors(conf)
    try:
        yield monitors
    finally:
        monitors.close()


def main(conf: str, *arguments: str) -> None:
    """Send the commands, then wait for the OSDs."""
    with _connected(conf) as monitors:
        print(json.dumps([monitors.command(each) for each in json.load(sys.stdin)]))
        if arguments:
            monitors.wait_until_up(int(arguments[1]))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except CommandFailed as problem:
        sys.exit(f"mon_commands: {problem}")
