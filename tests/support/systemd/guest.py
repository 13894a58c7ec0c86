"""One boot of the systemd guest: a root of `root.py`, read-write, until the guest has powered itself off.

Owns QEMU and virtiofsd while `boot` runs.  Files in the root tell the guest what to do, and the guest leaves results
there; the console has the messages of the kernel and systemd.
"""

import re
import selectors
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from support.guest import console as guest_console
from support.guest.cache import GuestCache
from support.guest.qemu import (
    Channel,
    Spec,
    kernel_words,
    kill_group,
    machine_command,
    share,
    spawn,
    start_virtiofsd,
    wait_for_sockets,
)

OFF = "reboot: Power down"
_STAMPED = re.compile(r"^\[ *(\d+\.\d+)\] (.*)$", re.MULTILINE)
_HANG_KEYS = "wlm"
"""SysRq: tasks in D state, what each CPU does, memory."""


@dataclass(frozen=True)
class Boot:
    """One boot, as seen from the host."""

    console: str
    is_off: bool
    """Whether the guest powered itself off before its time was over."""

    def second_of(self, text: str) -> float:
        """The time in guest seconds of the kernel log line with this text.  Raises `LookupError`."""
        for second, line in _STAMPED.findall(self.console):
            if text in line:
                return float(second)
        raise LookupError(f"the console never said {text!r}:\n{guest_console.tail(self.console)}")

    @property
    def complaints(self) -> list[str]:
        """The kernel's fault reports."""
        return guest_console.complaints(self.console)


def boot(
    root: Path, kernel: str, *, timeout_s: float, words: Sequence[str] = (), disks: Sequence[str] = ()
) -> Boot:
    """Boot the root under the kernel, with additional kernel parameters and QEMU options."""
    cache = GuestCache()
    spec = Spec(kernel, (), cpus=2, mem_mib=2560, timeout_s=timeout_s)
    channels = {name: Channel() for name in ("console", "monitor")}
    emulator = cache.emulator()
    append = (
        f"{kernel_words(spec)} loglevel=6 sysrq_always_enabled rw systemd.show_status=1 {' '.join(words)}"
    )
    with _scratch() as (run_dir, children):
        children.append(start_virtiofsd(emulator, run_dir, "root", root, xattr=True))
        wait_for_sockets(run_dir, ["root"])
        command = [*machine_command(spec, emulator, channels), *share("root", run_dir), *disks]
        command += ["-kernel", str(cache.kernel(kernel).image), "-append", append]
        fds = [channel.theirs.fileno() for channel in channels.values()]
        children.append(spawn(command, run_dir / "qemu.log", fds))
        for channel in channels.values():
            channel.theirs.close()
        console = _Console(channels["console"], channels["monitor"])
        is_off = console.follow(children[-1], timeout_s)
        console.text += (run_dir / "qemu.log").read_text(errors="replace")
        return Boot(console.text, is_off and OFF in console.text)


@contextmanager
def _scratch() -> Iterator[tuple[Path, list["subprocess.Popen[bytes]"]]]:
    """A directory for sockets and logs, and a list of processes that are killed at the end."""
    run_dir = Path(tempfile.mkdtemp(prefix="ublkpool-systemd-"))
    children: list[subprocess.Popen[bytes]] = []
    try:
        yield run_dir, children
    finally:
        for child in reversed(children):
            kill_group(child)
        shutil.rmtree(run_dir, ignore_errors=True)


class _Console:
    """The serial line, and the monitor, which shows what a hanging guest waits for."""

    def __init__(self, serial: Channel, monitor: Channel) -> None:
        self.text = ""
        self._serial, self._monitor = serial, monitor
        self._raw = bytearray()
        serial.sink = self._raw.extend
        self._selector = selectors.DefaultSelector()
        for channel in (serial, monitor):
            self._selector.register(channel.ours, selectors.EVENT_READ, channel)

    def follow(self, qemu: "subprocess.Popen[bytes]", timeout_s: float) -> bool:
        """Read until QEMU ends; False after the deadline, and then the text shows what the guest waits for."""
        ended = self._read(qemu, timeout_s)
        if not ended:
            for key in _HANG_KEYS:
                self._monitor.send("chardev-send-break console\n")
                self._read(qemu, 1)
                self._serial.send(key)
                self._read(qemu, 3)
        self.text = guest_console.clean(bytes(self._raw))
        self._selector.close()
        for channel in (self._serial, self._monitor):
            channel.ours.close()
        return ended

    def _read(self, qemu: "subprocess.Popen[bytes]", timeout_s: float) -> bool:
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            ended = qemu.poll() is not None
            ready = self._selector.select(0 if ended else 0.5)
            for key, _ in ready:
                channel: Channel = key.data
                if not channel.pump():
                    self._selector.unregister(channel.ours)
            if ended and not ready:
                return True
        return False
