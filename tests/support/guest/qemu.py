"""The parts of a guest: its description, QEMU's command line, its channels and its child processes.

Starts and ends processes; `boot.py` decides when.
"""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from support.guest.cache import Emulator
from support.guest.tsc import counter_khz

READ_BYTES = 1 << 16
SOCKET_TIMEOUT_S = 120
_KERNEL_WORDS = "console=ttyS0 quiet panic=-1 oops=panic no_timer_check root=root rootfstype=virtiofs"
# QEMU takes each byte of a `rep movsb` as an instruction, as no real CPU does: without these two CPU features the
# kernel copies 8 bytes at a time.
EXACT_CPU = "max,-erms,-fsrm"
# Features whose emulation takes about a fifth of QEMU's time in our tests: a fifth level of page tables to walk, the
# check of each user access (`stac` ends a block of translated code), and vectors of 32 bytes, with a state of hundreds
# of bytes to save at each switch of tasks.
FAST_CPU = f"{EXACT_CPU},-la57,-smap,-smep,-umip,-pku,-xsave,-avx,-avx2"


@dataclass(frozen=True)
class Spec:
    """The kernel to boot and the command to run in it."""

    kernel: str
    command: Sequence[str]
    cpus: int = 4
    mem_mib: int = 4096
    timeout_s: float = 900
    rw: Sequence[Path] = ()
    modules: Sequence[str] = ()
    cwd: Path = field(default_factory=Path.cwd)
    allow_warnings: bool = False
    console_log: Path | None = None
    kvm: bool = False
    exact: bool = False
    """Each instruction takes 1 ns of guest time, so that measurements repeat."""
    devices: Sequence[str] = ()
    """QEMU options for more hardware."""


class Channel:
    """Our end of a socket whose other end QEMU inherits."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.ours.setblocking(False)
        self.sink: Callable[[bytes], None] = lambda _: None

    def send(self, text: str) -> None:
        """Send if possible: QEMU may be dead, which `Machine` notices elsewhere."""
        with contextlib.suppress(OSError):
            self.ours.send(text.encode())

    def chardev(self, name: str) -> list[str]:
        """QEMU's option for its end of the socket."""
        return ["-chardev", f"socket,id={name},fd={self.theirs.fileno()}"]

    def pump(self) -> bool:
        """Pass received bytes on; False at the end of the stream."""
        try:
            data = self.ours.recv(READ_BYTES)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if data:
            self.sink(data)
        return bool(data)


def spawn(command: Sequence[str], log: Path, pass_fds: Sequence[int] = ()) -> subprocess.Popen[bytes]:
    """Start a child in its own session (this process handles Ctrl-C); the kernel kills it when this process dies."""
    with log.open("wb") as out:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            pass_fds=pass_fds,
            start_new_session=True,
        )


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a child and its process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def qemu_command(
    spec: Spec, emulator: Emulator, image: Path, run_dir: Path, tags: list[str], channels: dict[str, Channel]
) -> list[str]:
    """QEMU's command line."""
    # Turn an oops into a panic, because results after an oops prove nothing.
    append = f"{kernel_words(spec)} loglevel=5 ro init={run_dir}/init -- {run_dir}"
    command = [*machine_command(spec, emulator, channels), "-kernel", str(image), "-append", append]
    command += ["-device", "virtio-serial-pci"]
    for name in ("output", "control"):
        command += ["-device", f"virtserialport,chardev={name},name={name}"]
    for tag in tags:
        command += share(tag, run_dir)
    return [*command, *spec.devices]


def kernel_words(spec: Spec) -> str:
    """The kernel parameters of every guest: a reliable clock, and a panic rather than work after a fault.

    Source: kernel-parameters.txt (tsc, tsc_early_khz).
    """
    # Without tsc=reliable a busy guest drops to a slow clock.
    clock = "tsc=reliable"
    # An exact guest's counter counts instructions, and KVM tells a guest the frequency.
    khz = None if spec.exact or spec.kvm else counter_khz()
    return f"{_KERNEL_WORDS} {clock}" + (f" tsc_early_khz={khz}" if khz else "")


def machine_command(spec: Spec, emulator: Emulator, channels: dict[str, Channel]) -> list[str]:
    """QEMU with a machine, serial console and monitor on the channels of these names; no kernel, no disk."""
    command = [str(emulator.qemu), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    for directory in emulator.firmware_dirs:
        command += ["-L", str(directory)]
    command += ["-M", "q35", *accelerator(spec), "-smp", str(spec.cpus), "-m", str(spec.mem_mib)]
    command += ["-object", f"memory-backend-memfd,id=mem,size={spec.mem_mib}M,share=on"]
    command += ["-numa", "node,memdev=mem"]
    for name, channel in channels.items():
        command += channel.chardev(name)
    return [*command, "-serial", "chardev:console", "-mon", "chardev=monitor,mode=readline"]


def share(tag: str, run_dir: Path) -> list[str]:
    """QEMU's options for a directory served by the virtiofsd at TAG.sock."""
    chardev = ["-chardev", f"socket,id=fs-{tag},path={run_dir / tag}.sock"]
    return [*chardev, "-device", f"vhost-user-fs-pci,chardev=fs-{tag},tag={tag}"]


def start_virtiofsd(
    emulator: Emulator, run_dir: Path, tag: str, path: Path, *, xattr: bool = False
) -> subprocess.Popen[bytes]:
    """Serve a directory at TAG.sock in `run_dir`, optionally with extended attributes."""
    command = [str(emulator.virtiofsd), f"--socket-path={run_dir / tag}.sock"]
    if emulator.virtiofsd_is_rust:
        command += [f"--shared-dir={path}", "--cache=always", "--sandbox=chroot", "--log-level=error"]
        command += ["--xattr"] if xattr else []
    else:
        options = (f"source={path}", "cache=always", "sandbox=chroot", "log_level=err", *(["xattr"] * xattr))
        command += [word for option in options for word in ("-o", option)]
    return spawn(command, run_dir / f"virtiofsd-{tag}.log")


def wait_for_sockets(run_dir: Path, tags: Sequence[str]) -> None:
    """Wait until every virtiofsd listens.  Raises `RuntimeError` with the log of one that does not."""
    deadline = time.monotonic() + SOCKET_TIMEOUT_S
    for tag in tags:
        while not (run_dir / f"{tag}.sock").exists():
            if time.monotonic() > deadline:
                log = (run_dir / f"virtiofsd-{tag}.log").read_text(errors="replace")
                raise RuntimeError(f"virtiofsd for {tag} does not start:\n{log}")
            time.sleep(0.02)


def accelerator(spec: Spec) -> list[str]:
    """TCG unless KVM was asked for, because a guest can hang even if /dev/kvm opens."""
    if spec.kvm:
        return ["-accel", "kvm", "-cpu", "host"]
    if spec.exact:
        return ["-accel", "tcg,thread=single", "-icount", "shift=0", "-cpu", EXACT_CPU]
    return ["-accel", "tcg,thread=multi", "-cpu", FAST_CPU]
