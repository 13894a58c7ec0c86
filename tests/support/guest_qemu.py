"""What a guest is made of: its description, QEMU's command line, its channels and its child processes.

Starts and ends processes, decides nothing: guest_boot.py does.
"""

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from support.guest_cache import Emulator

READ_BYTES = 1 << 16


@dataclass(frozen=True)
class Spec:
    """What to boot and what to run in it."""

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
    """Time is instructions: each takes 1 ns, so what is measured repeats."""


class Channel:
    """Our end of a socket whose other end QEMU inherits."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.ours.setblocking(False)
        self.sink: Callable[[bytes], None] = lambda _: None

    def send(self, text: str) -> None:
        """Best effort: whoever is at the other end may be dead, which others notice."""
        with contextlib.suppress(OSError):
            self.ours.send(text.encode())

    def chardev(self, name: str) -> list[str]:
        """QEMU's option for its end."""
        return ["-chardev", f"socket,id={name},fd={self.theirs.fileno()}"]

    def pump(self) -> bool:
        """Hand on what has come; False at the end of the stream."""
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
    """Start a child in a session of its own (Ctrl-C is ours to handle) that the kernel kills when we die."""
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
    """End a child and what it forked."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def qemu_command(
    spec: Spec, emulator: Emulator, image: Path, run_dir: Path, tags: list[str], channels: dict[str, Channel]
) -> list[str]:
    """The whole of QEMU's command line."""
    # Without tsc=reliable a busy guest drops to a slow clock.
    # An oops is made a panic: what runs on after one proves nothing.
    append = (
        "console=ttyS0 quiet loglevel=5 panic=-1 oops=panic tsc=reliable no_timer_check "
        f"root=root rootfstype=virtiofs ro init={run_dir}/init -- {run_dir}"
    )
    command = [str(emulator.qemu), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    for directory in emulator.firmware_dirs:
        command += ["-L", str(directory)]
    command += ["-M", "q35", *accelerator(spec), "-smp", str(spec.cpus), "-m", str(spec.mem_mib)]
    command += ["-object", f"memory-backend-memfd,id=mem,size={spec.mem_mib}M,share=on"]
    command += ["-numa", "node,memdev=mem", "-kernel", str(image), "-append", append]
    for name, channel in channels.items():
        command += channel.chardev(name)
    command += ["-serial", "chardev:console", "-mon", "chardev=monitor,mode=readline"]
    command += ["-device", "virtio-serial-pci"]
    for name in ("output", "control"):
        command += ["-device", f"virtserialport,chardev={name},name={name}"]
    for tag in tags:
        command += ["-chardev", f"socket,id=fs-{tag},path={run_dir / tag}.sock"]
        command += ["-device", f"vhost-user-fs-pci,chardev=fs-{tag},tag={tag}"]
    return command


def accelerator(spec: Spec) -> list[str]:
    """TCG unless asked: /dev/kvm may exist, open, and the guest still hang."""
    if spec.kvm:
        return ["-accel", "kvm", "-cpu", "host"]
    if spec.exact:
        # Each byte of a `rep movsb` would count as an instruction, which it is on no CPU: without these two bits
        # of its CPU the kernel copies by 8 bytes.
        return ["-accel", "tcg,thread=single", "-icount", "shift=0", "-cpu", "max,-erms,-fsrm"]
    return ["-accel", "tcg,thread=multi", "-cpu", "max"]
