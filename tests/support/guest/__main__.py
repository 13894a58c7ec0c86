"""The test guest: Debian's kernels under QEMU with this machine's root read-only, for hosts without a driver.

    python -m support.guest fetch
    python -m support.guest run --kernel 7.3 --rw DIR -- COMMAND ...

The exit status is the command's; 123 if QEMU stalled three guests in a row, 124 after the timeout, 125 when the guest
died or fell silent, 126 when the command succeeded but the kernel's log shows a fault. `run` needs root, for virtiofsd.
"""

import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import FrameType

import click

from support.guest.apt_archive import ArchiveError
from support.guest.boot import STATUS_LOST_INTERRUPT, Machine, say
from support.guest.cache import KERNELS, CacheError, GuestCache
from support.guest.kernel_selftests import fetch_selftests
from support.guest.passed import VARIABLE as PASSED_TESTS
from support.guest.qemu import Spec
from support.nbdkit.source_package import fetch_plugins

KVM_PROBE_TIMEOUT_S = 20
CPUS = 4
BOOTS_MAX = 3
"""Of a command whose guest QEMU has stalled."""


@contextmanager
def exiting_on_signals() -> Iterator[None]:
    """Turn the signals that would end this process at once into exits that clean up."""

    def leave(number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@cache
def kvm_works(kernel: str) -> bool:
    """Whether KVM was asked for and boots a guest here."""
    if os.environ.get("UBLKPOOL_KVM") != "1":
        return False
    probe = Spec(kernel, ["true"], cpus=1, mem_mib=512, timeout_s=KVM_PROBE_TIMEOUT_S, kvm=True)
    with Machine(probe, GuestCache()) as machine:
        works = machine.wait() == 0
    say("KVM works" if works else "KVM does not boot a guest here, going on without")
    return works


def exact_cpus(asked: int | None) -> int:
    """The number of CPUs of an exact guest.  Raises `CacheError` if the request cannot be met."""
    if os.environ.get("UBLKPOOL_KVM") == "1":
        raise CacheError("an exact guest counts instructions, which KVM does not: unset UBLKPOOL_KVM")
    if asked not in (None, 1):
        raise CacheError(f"an exact guest has one CPU, not {asked}: leave --cpus out")
    return 1


class Guest:
    """Runs commands under a kernel, one boot per command."""

    def __init__(
        self,
        kernel: str,
        *,
        cpus: int = CPUS,
        mem_mib: int = 4096,
        timeout_s: float = 900,
        rw: Sequence[Path] = (),
        modules: Sequence[str] = (),
        allow_warnings: bool = False,
        console_log: Path | None = None,
        exact: bool = False,
    ) -> None:
        self._spec = Spec(
            kernel,
            (),
            cpus,
            mem_mib,
            timeout_s,
            [path.resolve() for path in rw],
            modules,
            allow_warnings=allow_warnings,
            console_log=console_log,
            exact=exact,
        )

    def run(self, command: Sequence[str], cwd: Path | None = None) -> int:
        """Boot, run the command, power off; its output goes to stdout."""
        if os.geteuid() != 0:
            raise CacheError("the guest shares the root through virtiofsd, which needs root: use sudo")
        kvm = not self._spec.exact and kvm_works(self._spec.kernel)
        spec = replace(self._spec, command=command, cwd=cwd or Path.cwd(), kvm=kvm)
        with exiting_on_signals(), tempfile.TemporaryDirectory(prefix="ublkpool-passed-") as shared:
            return _run(_noting_tests(spec, Path(shared)))


def _noting_tests(spec: Spec, shared: Path) -> Spec:
    """The same with a file in `shared` in which tests note that they have passed; an exact guest stays as it is."""
    if spec.exact:
        return spec
    command = ["env", f"{PASSED_TESTS}={shared}/tests", *spec.command]
    return replace(spec, command=command, rw=[*spec.rw, shared])


def _run(spec: Spec) -> int:
    """The command's status; it begins anew, in a fresh guest, if QEMU stalls the one that it ran in."""
    status = STATUS_LOST_INTERRUPT
    for boot in range(BOOTS_MAX):
        if boot:
            say("the command begins anew in a fresh guest, without the tests that have passed")
        with Machine(spec, GuestCache()) as machine:
            status = machine.wait()
        if status != STATUS_LOST_INTERRUPT:
            break
    return status


@click.group(help=__doc__)
def main() -> None:
    """The command line."""


@main.command()
def fetch() -> None:
    """Fetch QEMU, virtiofsd, the kernels and their selftests, and nbdkit's plugins into the cache."""
    guests = GuestCache()
    with exiting_on_signals():
        guests.fetch()
        fetch_selftests()
        fetch_plugins()
    print(f"guest: kernels {' and '.join(KERNELS)} are ready in {guests.root}")


@main.command(context_settings={"ignore_unknown_options": True})
@click.option("--kernel", type=click.Choice(KERNELS), required=True)
@click.option("--cpus", type=int, help=f"{CPUS}, of an exact guest 1")
@click.option("--exact", is_flag=True, help="one CPU on which each instruction takes 1 ns: times repeat")
@click.option("--mem", "mem_mib", default=4096, show_default=True, help="MiB")
@click.option("--timeout", "timeout_s", default=900.0, show_default=True, help="seconds, the boot included")
@click.option("--rw", multiple=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--module", "modules", multiple=True, help="loaded beside ublk_drv")
@click.option("--allow-warnings", is_flag=True, help="the kernel's complaints do not fail the run")
@click.option("--console-log", type=click.Path(dir_okay=False, path_type=Path), help="keep the console here")
@click.argument("command", nargs=-1, required=True)
def run(
    kernel: str,
    cpus: int | None,
    exact: bool,
    mem_mib: int,
    timeout_s: float,
    rw: tuple[Path, ...],
    modules: tuple[str, ...],
    allow_warnings: bool,
    console_log: Path | None,
    command: tuple[str, ...],
) -> None:
    """Run COMMAND as root in a fresh guest."""
    guest = Guest(
        kernel,
        cpus=exact_cpus(cpus) if exact else cpus or CPUS,
        mem_mib=mem_mib,
        timeout_s=timeout_s,
        rw=rw,
        modules=modules,
        allow_warnings=allow_warnings,
        console_log=console_log,
        exact=exact,
    )
    sys.exit(guest.run(command))


if __name__ == "__main__":
    try:
        main()
    except (ArchiveError, CacheError) as error:
        sys.exit(f"guest: {error}")
