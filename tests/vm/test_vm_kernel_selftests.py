"""The kernel's ublk selftests against ublkpool; `support/vm/kublk_server.py` replaces their server kublk."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.guest.kernel_selftests import fetch_selftests
from support.vm import bpftrace_shim, slow_writes
from support.vm.daemon import Daemon
from support.vm.kublk_server import answered, cut_off
from ublkpool.ublk.abi import Feature, feature_names
from ublkpool.ublk.control import get_features

TESTS = {
    # recover_01 and stress_05 take three minutes each.
    "6.12": (
        *("generic_06", "generic_07", "generic_13", "generic_17", "loop_02", "stress_02"),
        *("recover_01", "stress_05"),
    ),
    # 6.12 lacks what generic_16, part_01 and part_02 need, see FEATURES.
    "7.3": (
        *("generic_02", "generic_16", "null_01", "loop_01", "loop_05", "part_01", "part_02", "stress_01"),
    ),
}
"""By the kernel whose guest runs them where both run."""
DEADLINE_S = 1800.0
"""Seconds; only a test that hangs takes this long."""
SKIPPED = 4
ROOT = Path(__file__).resolve().parents[2]
TOOLS = {"part_01": "sfdisk"}
"""Tools that `make setup` installs, and without which a selftest would test less."""
FEATURES = {
    "generic_16": Feature.SAFE_STOP_DEV,
    "part_01": Feature.NO_AUTO_PART_SCAN,
    # Drivers without this flag scan partitions within START_DEV.
    "part_02": Feature.NO_AUTO_PART_SCAN,
}
"""Features without which a selftest skips itself."""

# The selftests run their loads for 20 or 40 s on machines some 20 times faster than the guest.
FIO = """#!/bin/bash
arguments=()
for each in "$@"; do
    case $each in
        --runtime=*) each=--runtime=8 ;;
        --size=256M | --size=512M) each=--size=24M ;;
        --iodepth=256) each=--iodepth=32 ;;
        --numjobs=*) each=--numjobs=1 ;;
    esac
    arguments+=("$each")
done
exec {fio} "${{arguments[@]}}"
"""
AWAIT_FIO = '_await_fio "{}" "${{dev_id}}"'
# Without it the server may be dead, and the disk gone, before fio has opened it: fio would make a file of that name.
FIO_IS_AT_WORK = """
_await_fio()
{
	local pid=$1 disk=ublkb$2 jobs job fd before now

	read -r before < "/sys/block/$disk/stat"
	while kill -0 "$pid" 2> /dev/null; do
		read -r -a jobs < "/proc/$pid/task/$pid/children"
		for job in "${jobs[@]}"; do
			for fd in "/proc/$job/fd/"*; do
				[ "$fd" -ef "/dev/$disk" ] || continue
				read -r now < "/sys/block/$disk/stat"
				[ "$now" = "$before" ] || return 0
			done
		done
		sleep 0.1
	done
	echo "[FAIL] fio ended before it had done anything at $disk"
}
"""
# The guest has no udevd.  Opening a disk during its partition scan fails with EBUSY, so wait for the scan.
UDEVADM = """#!/bin/sh
for each in /dev/ublkb*; do
    [ ! -b "$each" ] || timeout 20 blockdev --getsz "$each" > /dev/null 2>&1
done
exit 0
"""


def _program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def _replace(script: Path, text: str, here: str) -> None:
    whole = script.read_text()
    assert text in whole, f"{script.name} has no {text!r} any more"
    script.write_text(whole.replace(text, here))


def _await_rather_than_sleep(scripts: Path) -> None:
    """Where a script gives another program a time to begin, wait until it has begun."""
    _replace(scripts / "test_generic_02.sh", "for _ in $(seq 100); do", "for _ in $(seq 6000); do")
    is_open = "[ /dev/ublkb${dev_id} -ef /proc/$dd_pid/fd/0 ] || ! kill -0 $dd_pid"
    _replace(scripts / "test_generic_16.sh", "sleep 0.2", f"until {is_open}; do sleep 0.2; done")
    common = scripts / "test_common.sh"
    _replace(common, "&\n\tsleep 4", f"&\n\t{AWAIT_FIO.format('$!')}")
    _replace(common, "&\n\tfio --name=batchjob", "&\n\tlocal first=$!\n\tfio --name=batchjob")
    both = "\n\t".join(AWAIT_FIO.format(pid) for pid in ("$first", "$!"))
    _replace(common, "&\n\tsleep 2", f"&\n\t{both}")
    _replace(scripts / "test_stress_05.sh", "&\n\tsleep 4", f"&\n\t{AWAIT_FIO.format('$!')}")
    common.write_text(common.read_text() + FIO_IS_AT_WORK)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, session_daemon: Daemon) -> Iterator[Path]:
    """The directory of the selftests and of the programs that they call."""
    made = tmp_path_factory.mktemp("selftests")
    shutil.copytree(fetch_selftests(), made / "ublk")
    # generic_06 kills the server during a request of 2 s, and distinguishes an error of that moment from a later one.
    # In the guest the programs that kill it take many seconds to start.
    for limit, here in (
        ("-t fault_inject", "-t slow_writes"),
        ("--delay_us 2000000", "--delay_us 600000000"),
        ("-ge 5 ", "-ge 300 "),
    ):
        _replace(made / "ublk" / "test_generic_06.sh", limit, here)
    _await_rather_than_sleep(made / "ublk")
    (made / "bin").mkdir()
    (made / "state").mkdir()
    (made / "tmp").mkdir()
    python = Path(sys.executable).resolve()
    _program(made / "bin" / "bpftrace", f'#!/bin/sh\nexec {python} -I -S {bpftrace_shim.__file__} "$@"\n')
    _program(made / "bin" / "fio", FIO.format(fio=shutil.which("fio")))
    _program(made / "bin" / "udevadm", UDEVADM)
    names = feature_names(get_features())
    (made / "state" / "features").write_text("\n".join(names))
    (made / "state" / "DELAY").write_text(str(ROOT / "examples" / "demo_event.py"))
    (made / "state" / "SLOW_WRITES").write_text(slow_writes.__file__)
    (made / "state" / "PYTHON").write_text(sys.executable)
    with answered(made / "ublk" / "kublk", _environment(made, session_daemon)):
        yield made
    shutil.rmtree(made)


def _environment(directory: Path, daemon: Daemon) -> dict[str, str]:
    return {
        **os.environ,
        "PATH": f"{directory / 'bin'}:{os.environ['PATH']}",
        "TMPDIR": str(directory / "tmp"),
        "KUBLK_RUN_DIR": str(daemon.run_dir),
        "KUBLK_STATE": str(directory / "state"),
    }


def _run(directory: Path, name: str, daemon: Daemon) -> tuple[int, str]:
    """Run a selftest; returns its exit status and output.  At the deadline kills it with all its children."""
    with subprocess.Popen(
        ["bash", directory / "ublk" / f"test_{name}.sh"],
        cwd=directory / "ublk",
        env=_environment(directory, daemon),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            said, _ = process.communicate(timeout=DEADLINE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            cut_off(directory / "state")
            said = f"{process.communicate()[0]}\nit has not ended after {DEADLINE_S:.0f} s"
        return process.returncode, said


def _why_not_here(name: str) -> str:
    """Why this machine or its driver cannot run the selftest; empty if it can."""
    features = Feature(get_features())
    if name in TOOLS and shutil.which(TOOLS[name]) is None:
        return f"{TOOLS[name]} is not installed"
    if name in FEATURES and not features & FEATURES[name]:
        return f"the driver does not offer {FEATURES[name].name}"
    return ""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.one_kernel(kernel))
        for kernel, names in TESTS.items()
        for name in names
    ],
)
def test_the_kernels_selftest(daemon: Daemon, directory: Path, name: str) -> None:
    if reason := _why_not_here(name):
        pytest.skip(reason)
    status, said = _run(directory, name, daemon)
    print(said)
    assert status != SKIPPED, f"{name} skips itself, which is not expected"
    assert status == 0 and not re.search(r"\[FAIL\]|fail", said), said
