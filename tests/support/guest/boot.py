"""One run of the test guest: its processes, its channels and the verdict.

Owns QEMU and the virtiofsd processes from start to end: they die with this process (PR_SET_PDEATHSIG), are
killed on every way out of `Machine`, and no other process is killed. The guest communicates over four sockets that
this module makes and QEMU inherits: the command's output, a control line protocol (init.sh), the
kernel's console and QEMU's monitor. One selector loop in the calling thread serves all of them.
"""

import os
import selectors
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from support.guest import console as guest_console
from support.guest import lost_interrupts
from support.guest.cache import GuestCache
from support.guest.qemu import (
    Channel,
    Spec,
    kill_group,
    qemu_command,
    spawn,
    start_virtiofsd,
    wait_for_sockets,
)

STATUS_LOST_INTERRUPT = 123
STATUS_TIMEOUT = 124
STATUS_CRASH = 125
STATUS_COMPLAINT = 126
BOOT_TIMEOUT_S = 600
# The guest's agent sends a heartbeat every 5 s; on a loaded host one may come late, from a dead guest none comes.
SILENCE_TIMEOUT_S = 600
DUMP_TIMEOUT_S = 20
LAST_WORDS_S = 5
INIT_SCRIPT = Path(__file__).with_name("init.sh")
PASSED_VARIABLES = ("PATH", "HOME", "TERM", "CI", "LANG", "PYTEST_ADDOPTS")


def guest_environment(kernel: str, module_root: Path, exact: bool = False) -> dict[str, str]:
    """The command's environment: parts of ours, and variables for a read-only root."""
    passed = {k: v for k, v in os.environ.items() if k in PASSED_VARIABLES or k.startswith("UBLKPOOL_")}
    return passed | {
        "UBLKPOOL_GUEST": kernel,
        "UBLKPOOL_EXACT": "1" if exact else "",
        "MODPROBE_OPTIONS": f"-d {module_root}",
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "HYPOTHESIS_STORAGE_DIRECTORY": "/tmp/hypothesis",
    }


def bash_array(name: str, words: Sequence[str]) -> str:
    """A bash array assignment with these words quoted."""
    return f"{name}=({' '.join(shlex.quote(word) for word in words)})\n"


def parse_status(line: str) -> int | None:
    """The command's exit status if this line of the control port has it, else None."""
    verb, _, rest = line.partition(" ")
    return int(rest) if verb == "exit" and rest.isdigit() else None


class Machine:
    """A booted guest. Use as a context manager; `wait` gives the status."""

    def __init__(
        self, spec: Spec, cache: GuestCache, on_output: Callable[[bytes], None] | None = None
    ) -> None:
        """The command's output goes to stdout, or to `on_output`."""
        self._spec = spec
        self._kernel = cache.kernel(spec.kernel)
        self._emulator = cache.emulator()
        self._dir = Path(tempfile.mkdtemp(prefix="ublkpool-guest-"))
        self._children: list[subprocess.Popen[bytes]] = []
        self._console = b""
        self._control = b""
        self._lines: list[str] = []
        self._channels = {name: Channel() for name in ("output", "control", "console", "monitor")}
        self._channels["output"].sink = self._on_output
        self._take_output = on_output or self._print
        self._channels["control"].sink = self._on_control
        self._channels["console"].sink = self._on_console
        self._in_service = lost_interrupts.InService()
        self._channels["monitor"].sink = lambda data: self._in_service.hear(data.decode(errors="replace"))
        self._asked_at = time.monotonic()
        self._selector = selectors.DefaultSelector()
        self._heard_at = time.monotonic()
        self._up = False
        self._status: int | None = None

    def __enter__(self) -> "Machine":
        try:
            self._start()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def fail_power(self, moment: Callable[[], bool]) -> bool:
        """Serve the guest until `moment` is true, then kill it; False if it or its command ended before."""
        deadline = time.monotonic() + self._spec.timeout_s
        while not moment():
            if not self._pump(0.5) or self._status is not None or time.monotonic() > deadline:
                return False
        kill_group(self._qemu)
        return True

    @property
    def log(self) -> str:
        """The console so far."""
        return self._log

    def wait(self) -> int:
        """Serve the guest until it ends or its time is over; returns the command's status, or one of STATUS_*."""
        deadline = time.monotonic() + self._spec.timeout_s
        while self._status is None and self._pump(0.5):
            now = time.monotonic()
            if now > deadline:
                return self._give_up(STATUS_TIMEOUT, f"no end after {self._spec.timeout_s:g} s")
            if now - self._heard_at > (SILENCE_TIMEOUT_S if self._up else BOOT_TIMEOUT_S):
                return self._give_up(STATUS_CRASH, "nothing heard from it any more")
            if lost := self._lost_interrupt(now):
                say(f"QEMU's fault, not the kernel's: {lost}")
                return STATUS_LOST_INTERRUPT
        self._drain(LAST_WORDS_S, lambda: "guest: ended" in self._log)
        if self._status is None:
            return self._report(
                STATUS_CRASH, "the guest's kernel panicked" if self._panicked else "QEMU ended"
            )
        return self._judge(self._status)

    def _lost_interrupt(self, now: float) -> str:
        """See `lost_interrupts`; empty if all is well, or not known yet."""
        # An exact guest is not asked: what interrupts it could show in its measurements.
        if self._up and not self._spec.exact and now - self._asked_at >= lost_interrupts.ASK_EVERY_S:
            self._asked_at = now
            self._channels["monitor"].send(lost_interrupts.question(self._spec.cpus))
        return self._in_service.lost

    @property
    def _panicked(self) -> bool:
        return guest_console.panicked(self._log)

    @property
    def _log(self) -> str:
        return guest_console.clean(self._console)

    def _start(self) -> None:
        shutil.copy(INIT_SCRIPT, self._dir / "init")
        (self._dir / "init").chmod(0o755)
        (self._dir / "env").write_text(self._env_file())
        shares = {"root": Path("/")} | {f"rw{i}": path for i, path in enumerate(self._spec.rw)}
        for tag, path in shares.items():
            self._children.append(start_virtiofsd(self._emulator, self._dir, tag, path))
        wait_for_sockets(self._dir, list(shares))
        fds = [channel.theirs.fileno() for channel in self._channels.values()]
        self._children.append(spawn(self._qemu_command(list(shares)), self._dir / "qemu.log", fds))
        for channel in self._channels.values():
            channel.theirs.close()
            self._selector.register(channel.ours, selectors.EVENT_READ, channel)

    def _env_file(self) -> str:
        spec = self._spec
        environ = guest_environment(spec.kernel, self._kernel.module_root, spec.exact)
        # The guest's tmpfs hides these paths if they lie in /tmp.
        kept = [spec.cwd, self._kernel.module_root, Path(sys.prefix)]
        return (
            f"CWD={shlex.quote(str(spec.cwd))}\n"
            f"MODULE_ROOT={shlex.quote(str(self._kernel.module_root))}\n"
            + bash_array("COMMAND", spec.command)
            + bash_array("ENVIRON", [f"{k}={v}" for k, v in environ.items()])
            + bash_array("KEEP", [str(path) for path in kept])
            + bash_array("RW", [str(path) for path in spec.rw])
            + bash_array("MODULES", ["ublk_drv", *spec.modules])
        )

    def _qemu_command(self, tags: list[str]) -> list[str]:
        return qemu_command(self._spec, self._emulator, self._kernel.image, self._dir, tags, self._channels)

    @property
    def _qemu(self) -> subprocess.Popen[bytes]:
        return self._children[-1]

    def _pump(self, timeout_s: float) -> bool:
        """Serve the channels once; False when QEMU has ended and all of its output is read."""
        ended = self._qemu.poll() is not None
        ready = self._selector.select(0 if ended else timeout_s)
        for key, _ in ready:
            channel: Channel = key.data
            if not channel.pump():
                self._selector.unregister(channel.ours)
        return bool(ready) or not ended

    def _drain(self, timeout_s: float, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and not done() and self._pump(0.2):
            pass

    def _on_output(self, data: bytes) -> None:
        self._heard_at = time.monotonic()
        self._take_output(data)

    def _print(self, data: bytes) -> None:
        while data:
            data = data[os.write(sys.stdout.fileno(), data) :]

    def _on_console(self, data: bytes) -> None:
        self._console += data
        if self._spec.console_log:
            with self._spec.console_log.open("ab") as log:
                log.write(data)

    def _on_control(self, data: bytes) -> None:
        self._heard_at = time.monotonic()
        *lines, self._control = (self._control + data).split(b"\n")
        for line in lines:
            self._on_control_line(line.decode(errors="replace"))

    def _on_control_line(self, line: str) -> None:
        if line.startswith("up "):
            self._up = True
            _, release, cpus, uptime = line.split()
            say(f"{release}, {cpus} CPUs, up after {uptime} s")
        elif (status := parse_status(line)) is not None:
            self._status = status

    def _give_up(self, status: int, why: str) -> int:
        """Report why the guest hangs, with a dump of its tasks if it still answers."""
        say(f"{why}; asking the guest what it waits for")
        before = len(self._console)
        self._channels["control"].send("dump\n")
        self._drain(DUMP_TIMEOUT_S, lambda: "guest: dumped" in self._log)
        if "guest: dumped" not in self._log:
            self._sysrq_over_serial("w")
            self._sysrq_over_serial("l")
        return self._report(status, why, before)

    def _sysrq_over_serial(self, key: str) -> None:
        self._channels["monitor"].send("chardev-send-break console\n")
        self._drain(1, lambda: False)
        self._channels["console"].send(key)
        self._drain(2, lambda: False)

    def _judge(self, status: int) -> int:
        found = guest_console.complaints(self._log)
        if not found:
            return status
        for line in found:
            say(f"kernel: {line}")
        if self._spec.allow_warnings:
            return status
        return self._report(status or STATUS_COMPLAINT, "the kernel complained")

    def _report(self, status: int, why: str, since: int | None = None) -> int:
        say(f"{why} (kernel {self._spec.kernel}). The kernel's last words:")
        said = guest_console.tail(self._log)
        if since is not None:
            said = guest_console.clean(self._console[since:])
        print(said, file=sys.stderr)
        for path in sorted(self._dir.glob("*.log")):
            if text := path.read_text(errors="replace").strip():
                print(f"--- {path.name}\n{guest_console.tail(text, 20)}", file=sys.stderr)
        say(f"ended with status {status}: {why}")
        return status

    def _close(self) -> None:
        for child in reversed(self._children):
            kill_group(child)
        for channel in self._channels.values():
            channel.ours.close()
            channel.theirs.close()
        self._selector.close()
        shutil.rmtree(self._dir, ignore_errors=True)


def say(text: str) -> None:
    """Print a line of the runner, separate from the command's output."""
    print(f"guest: {text}", file=sys.stderr, flush=True)
