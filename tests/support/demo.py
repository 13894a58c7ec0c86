"""The tour of `make demo`: serves devices end to end on a real driver for a minute, and shows the results.

    python -m support.demo

Needs root and the driver; without them on the host the Makefile runs it in a guest.  All its files are in one temporary
directory and are removed at the end; a failure ends it with status 1, the reason and the logs.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple, NoReturn

from ublkpool.daemon.admin.client import Client
from ublkpool.daemon.errors import DaemonError, DaemonUnreachable
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.daemon.status import DeviceStats, DeviceStatus

WIDTH = 100
MIB = 1 << 20
QUEUES = min(4, os.cpu_count() or 1)
FILE_BYTES = 512 * MIB
MEMORY_BYTES = 64 * MIB
FIO_JOB_BYTES = 16 * MIB
MAX_IO_BYTES = 512 << 10
# A distinct block, to find it again in the backend's memory.
MARK_OFFSET = 48 * MIB  # 768 * 64K
MARK_BYTES = 64 << 10
START_DEADLINE_S = 120.0
COMMAND_DEADLINE_S = 240.0
LOG_LINES = 40
# Left out of the copied standard library, which then has some 8 MB in some 400 files.
NOT_COPIED = (
    *("__pycache__", "*-packages", "test", "tests", "lib-dynload", "config-*", "ensurepip", "encodings"),
    *("idlelib", "lib2to3", "pydoc_data", "tkinter", "turtledemo", "distutils"),
)


class Failure(Exception):
    """A check of the tour failed."""


class Column(NamedTuple):
    """One device in the report."""

    device: DeviceStatus
    stats: DeviceStats
    verified: str
    landed: str
    killed: str


def main() -> None:
    """Run the tour; returns the exit status, 0 if every check passed."""
    signal.signal(signal.SIGTERM, _interrupted)
    started_s = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="ublkpool-demo-") as directory:
            _tour(Path(directory))
    except (Failure, DaemonError) as error:
        sys.exit(f"\n{_bold('The demo failed')}: {error}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; everything is cleaned up")
    print(f"\nAll of it is as it must be, and nothing is left behind. {time.monotonic() - started_s:.0f} s.")


def _interrupted(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _tour(directory: Path) -> None:
    if os.geteuid() or not os.access("/dev/ublk-control", os.W_OK):
        raise Failure("needs root and /dev/ublk-control; `make demo` finds another way without them")
    where = "in a guest" if "UBLKPOOL_GUEST" in os.environ else "on this machine"
    print(f"{_bold('ublkpool')}, a tour on Linux {os.uname().release}, {where}")
    before = _traces()
    stage = Stage(directory)
    try:
        with stage:
            columns = [_serve_a_file(stage), _serve_from_memory(stage)]
            _stop(stage)
    except BaseException as error:
        if not isinstance(error, KeyboardInterrupt):
            stage.show_logs()
        raise
    left = sorted(_traces() - before)
    if left:
        raise Failure(f"left behind: {', '.join(left)}")
    _report(columns)


class Stage:
    """The daemon, the backends and the mounts of one tour; the end of the context ends all of them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.run_dir = directory / "run"
        self.mount_point = directory / "mnt"
        self.mount_point.mkdir()
        self.client = Client(self.run_dir)
        self.daemon: subprocess.Popen[bytes] | None = None
        self._cleanup = ExitStack()

    def __enter__(self) -> "Stage":
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def start(self, name: str, *arguments: str) -> "subprocess.Popen[bytes]":
        """Start an `ublkpool` command in the background; it ends with the stage at the latest."""
        command = [sys.executable, "-m", "ublkpool.daemon", *arguments, "--run-dir", str(self.run_dir)]
        with (self.directory / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "UBLKPOOL_STATE_DIR": str(self.directory / "state")},
            )
        return self.own(process)

    def own(
        self, process: "subprocess.Popen[bytes]", patience_s: float = START_DEADLINE_S
    ) -> "subprocess.Popen[bytes]":
        """End this process with the stage."""
        self._cleanup.callback(_end, process, patience_s)
        return process

    @contextmanager
    def mounted(self, node: str) -> Iterator[Path]:
        """Mount the device's file system for the length of a block."""
        _run("mount", node, str(self.mount_point))
        try:
            yield self.mount_point
        finally:
            _run("umount", str(self.mount_point))

    def status(self, name: str) -> DeviceStatus:
        """A device's status from `ublkpool list`."""
        return next(each for each in self.client.devices() if each.name == name)

    def stats(self, name: str) -> DeviceStats:
        """A device's counters from `ublkpool stats`."""
        return self.client.stats(name)[0]

    def show_logs(self) -> None:
        """The logs of the daemon and the backends."""
        for log in sorted(self.directory.glob("*.log")):
            lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
            print(f"\n--- {log.name}", *(lines or ["(empty)"]), sep="\n", file=sys.stderr)


def _serve_a_file(stage: Stage) -> Column:
    _title("A file as a disk: the backend is a process of its own, every queue has a worker")
    with _step("ublkpool serve") as say:
        stage.daemon = stage.start("daemon", "serve")
        _wait_for(stage.daemon, lambda: _answers(stage.client))
        say(f"the daemon is up, process {stage.daemon.pid}")
    with _step(f"ublkpool add vol0 --queues {QUEUES}") as say:
        stage.client.add(DeviceConfig(name="vol0", queues=QUEUES))
        say("waits for a backend")
    with _step(f"ublkpool backend file --device vol0 path=vol0.img size={FILE_BYTES // MIB}M &") as say:
        backend, device = _attach_file(stage)
        node = _node(device)
        say(f"process {backend.pid} attached; {node} is live")
    with _step(f"mkfs.ext4 {node}") as say:
        _run("mkfs.ext4", "-q", "-F", node)
        say("a file system is on it")
    copied = _copy_a_tree(stage, node)
    written, waited = _write_and_kill(stage, node, backend)
    stats, device = _settled(stage, "vol0"), stage.status("vol0")
    return Column(
        device,
        stats,
        f"{copied}, {written}",
        "vol0.img, straight from the pool",
        f"once: {waited} requests waited, {_total(stats, 'replays')} sent again",
    )


def _attach_file(stage: Stage) -> tuple["subprocess.Popen[bytes]", DeviceStatus]:
    backend = stage.start(
        "backend-vol0", "backend", "file", "--device", "vol0", "path=vol0.img", f"size={FILE_BYTES}"
    )
    _wait_for(backend, lambda: _is_served_by(stage.status("vol0"), backend.pid))
    return backend, stage.status("vol0")


def _is_served_by(device: DeviceStatus, pid: int) -> bool:
    if device.state == "failed":
        raise Failure(f"{device.name}: {device.reason}")
    return device.state == "live" and device.backend.attached and device.backend.pid == pid


def _copy_a_tree(stage: Stage, node: str) -> str:
    source = Path(os.__file__).parent
    with _step(f"mount {node} mnt && cp -r {source} mnt") as say, stage.mounted(node) as mnt:
        expected, tree_bytes = _copied(source, mnt / "tree")
        say(f"{len(expected)} files, {_mib(tree_bytes)}")
    with _step(f"umount mnt && e2fsck -f -n {node}") as say:
        _run("e2fsck", "-f", "-n", node)
        say("clean")
    with _step(f"mount {node} mnt && sha256sum -c") as say, stage.mounted(node) as mnt:
        found = {str(each): sha256(each.read_bytes()).digest() for each in _files(mnt / "tree")}
        wrong = sorted(name for name in expected if found.get(name) != expected[name])
        if wrong or len(found) != len(expected):
            raise Failure(f"{len(wrong)} of {len(expected)} files differ, such as {wrong[:1]}")
        say("every file is what it was")
    return f"{len(expected)} files"


def _copied(source: Path, target: Path) -> tuple[dict[str, bytes], int]:
    """Copy a tree; returns the digest of each file and the total bytes."""
    expected = {}
    tree_bytes = 0

    def copy(origin: str, destination: str) -> None:
        nonlocal tree_bytes
        content = Path(origin).read_bytes()
        Path(destination).write_bytes(content)
        expected[destination] = sha256(content).digest()
        tree_bytes += len(content)

    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*NOT_COPIED), copy_function=copy)
    return expected, tree_bytes


def _write_and_kill(stage: Stage, node: str, backend: "subprocess.Popen[bytes]") -> tuple[str, int]:
    total_bytes = FIO_JOB_BYTES * QUEUES
    before = _moved(stage.stats("vol0"))
    with _step(f"fio --filename={node} --rw=randwrite --verify=crc32c ... &") as say:
        fio = _start_fio(stage, "vol0", node, range(QUEUES))
        _wait_for(fio, lambda: _moved(stage.stats("vol0")) - before > total_bytes // 8)
        say(f"{QUEUES} jobs, one a queue, write")
    with _step(f"kill -9 {backend.pid}") as say:
        backend.kill()
        backend.wait()
        _wait_for(fio, lambda: not stage.status("vol0").backend.attached and _in_flight(stage) > 0)
        waiting = _in_flight(stage)
        say(f"the backend is dead; {waiting} requests wait, none fails")
    with _step("ublkpool backend file --device vol0 path=vol0.img &") as say:
        successor, _ = _attach_file(stage)
        say(f"process {successor.pid} attached and is sent what the first did not answer")
    with _step("wait") as say:
        verified_bytes = _fio_result(stage, "vol0", fio)
        say(f"fio: {_mib(verified_bytes)} written, read back and verified, no error")
    return f"{_mib(verified_bytes)} by fio", waiting


def _serve_from_memory(stage: Stage) -> Column:
    _title("A disk in memory: the backend says, write by write, where in its own memory the data shall land")
    with _step(f"ublkpool add ram --placement backend --backend memory size={MEMORY_BYTES // MIB}M") as say:
        device = _add_memory(stage)
        node = _node(device)
        say(f"{node} is live; the daemon runs its backend, process {device.backend.pid}")
    with _step(f"fio --filename={node} --rw=randwrite --verify=crc32c ...") as say:
        verified_bytes = _fio_result(stage, "ram", _start_fio(stage, "ram", node, range(2)))
        say(f"{_mib(verified_bytes)} written, read back and verified")
    memory = _own_memory(device.backend.pid)
    with _step(f"dd if=mark of={node} seek=768 bs=64K && cmp -n 64K -i 0:48M mark {memory}") as say:
        _find_mark(node, memory)
        say("the block lies in the backend's own memory, where it had said")
    stats = _settled(stage, "ram")
    return Column(
        stage.status("ram"),
        stats,
        f"{_mib(verified_bytes)} by fio",
        f"memory of process {device.backend.pid}, where it said",
        "no",
    )


def _add_memory(stage: Stage) -> DeviceStatus:
    from ublkpool.daemon.settings.config import BackendConfig

    backend = BackendConfig(kind="memory", options={"size": str(MEMORY_BYTES)}, cwd=str(stage.directory))
    queues = min(2, QUEUES)
    return stage.client.add(DeviceConfig(name="ram", queues=queues, placement="backend", backend=backend))


def _own_memory(pid: int | None) -> Path:
    for each in Path(f"/proc/{pid}/fd").iterdir():
        if "memfd:disk-ram" in str(each.readlink()):
            return each
    raise Failure(f"process {pid} has no memory of its own")


def _find_mark(node: str, memory: Path) -> None:
    mark = random.Random(0).randbytes(MARK_BYTES)
    with Path(node).open("r+b", buffering=0) as disk:
        os.pwrite(disk.fileno(), mark, MARK_OFFSET)
        os.fsync(disk.fileno())
    with memory.open("rb") as content:
        if os.pread(content.fileno(), MARK_BYTES, MARK_OFFSET) != mark:
            raise Failure(f"the block is not at byte {MARK_OFFSET} of {memory}")


def _stop(stage: Stage) -> None:
    _title("The end")
    assert stage.daemon is not None
    with _step("ublkpool del --all") as say:
        names = stage.client.delete(None)
        say(f"{' and '.join(names)} are gone, and so are their workers and backends")
    with _step(f"kill {stage.daemon.pid}") as say:
        stage.daemon.terminate()
        if stage.daemon.wait(START_DEADLINE_S):
            raise Failure(f"the daemon ended with status {stage.daemon.returncode}")
        say("the daemon ended with status 0")


def _start_fio(stage: Stage, name: str, node: str, jobs: Sequence[int]) -> "subprocess.Popen[bytes]":
    """A fio job per queue, on a CPU whose requests come to that queue, in its own part of the disk."""
    block_bytes = int(Path(f"/sys/block/{Path(node).name}/queue/logical_block_size").read_text())
    settings = [
        *("[global]", f"filename={node}", "ioengine=libaio", "direct=1", "iodepth=32", "thread=1"),
        *("rw=randwrite", f"bsrange={block_bytes}-{MAX_IO_BYTES}", f"blockalign={block_bytes}"),
        # Slow enough that a backend can be killed meanwhile.
        "rate=,8m",
        *("verify=crc32c", "verify_fatal=1", "do_verify=1", "randrepeat=1", f"size={FIO_JOB_BYTES}"),
    ]
    queues = sorted(int(each.name) for each in Path(f"/sys/block/{Path(node).name}/mq").iterdir())
    for job in jobs:
        cpus = Path(f"/sys/block/{Path(node).name}/mq/{queues[job % len(queues)]}/cpu_list").read_text()
        cpu = cpus.replace("-", ",").split(",")[0].strip()
        settings += [f"[queue{job}]", f"offset={job * FIO_JOB_BYTES}", f"cpus_allowed={cpu}"]
    (stage.directory / f"{name}.fio").write_text("\n".join(settings) + "\n")
    command = ["fio", "--output-format=json", f"--output={name}.json", f"{name}.fio"]
    with (stage.directory / f"fio-{name}.log").open("wb") as log:
        fio = subprocess.Popen(command, cwd=stage.directory, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    # fio cannot end while its requests wait for a backend; they fail when the daemon ends.
    return stage.own(fio, patience_s=1.0)


def _fio_result(stage: Stage, name: str, fio: "subprocess.Popen[bytes]") -> int:
    """Wait for fio; returns the bytes that it wrote and verified."""
    try:
        status = fio.wait(COMMAND_DEADLINE_S)
    except subprocess.TimeoutExpired:
        raise Failure(f"fio has not ended after {COMMAND_DEADLINE_S:.0f} s") from None
    if status:
        raise Failure(f"fio ended with status {status}")
    # fio prints warnings before the JSON.
    text = (stage.directory / f"{name}.json").read_text()
    jobs = json.loads(text[text.index("{") :])["jobs"]
    written, read = (sum(each[way]["io_bytes"] for each in jobs) for way in ("write", "read"))
    if any(each["error"] for each in jobs) or written != read or not written:
        raise Failure(f"fio wrote {written} bytes and verified {read}")
    return int(written)


def _settled(stage: Stage, name: str) -> DeviceStats:
    """The counters of a device at rest.  Raises `Failure` if one is wrong."""
    assert stage.daemon is not None
    # A client gets its answer a moment before the worker counts it.
    _wait_for(stage.daemon, lambda: not _in_flight(stage, name))
    stats = stage.stats(name)
    _check_stats(stats)
    return stats


def _check_stats(stats: DeviceStats) -> None:
    pool, queues = stats.pool, stats.queues
    wrong = {
        "errors": sum(each.errors for each in queues),
        "buffers still lent": pool.lent_count,
        "buffers waited for": pool.waiting_count,
        "buffers that did not come back": pool.lent_total - pool.returned_total,
        "requests in flight": sum(each.in_flight for each in queues),
        "bytes copied by us": sum(each.copies.own_bytes for each in queues),
        "bytes written, but not copied once": _moved(stats) - _total(stats, "kernel_write_bytes"),
        "queues without a write": sum(not each.requests.write for each in queues),
        "violations": _total(stats, "violations"),
    }
    found = [f"{count} {what}" for what, count in wrong.items() if count]
    if found:
        raise Failure(f"{stats.name}: {', '.join(found)}")


def _in_flight(stage: Stage, name: str = "vol0") -> int:
    return sum(each.in_flight for each in stage.stats(name).queues)


def _moved(stats: DeviceStats) -> int:
    return sum(each.bytes.write for each in stats.queues)


def _total(stats: DeviceStats, counter: str) -> int:
    return sum(each.counters[counter] for each in stats.queues)


def _report(columns: Sequence[Column]) -> None:
    rows: list[tuple[str, Callable[[Column], str]]] = [
        ("", lambda c: f"{c.device.name}: {c.device.backend.kind}"),
        ("queues x depth", lambda c: f"{c.device.queues} x {c.device.depth}, a process each"),
        ("a write's place", lambda c: f"named by the {c.device.placement}"),
        ("written", _written),
        ("over the queues", _spread),
        ("verified", lambda c: c.verified),
        ("backend killed", lambda c: c.killed),
        ("landed in", lambda c: c.landed),
        ("buffers", lambda c: f"{c.stats.pool.lent_total} lent, {c.stats.pool.returned_total} returned"),
        ("copies per byte", _copies),
    ]
    _title("What it did")
    flags = " ".join(columns[0].device.flags)
    print(f"  {'kernel':16} {os.uname().release}\n  {'flags':16} {_wrapped(flags, 19)}\n")
    for label, text in rows:
        first, second = (text(column) for column in columns)
        line = f"  {label:16} {first:42} {second}".rstrip()
        print(_bold(line) if not label else line)


def _written(column: Column) -> str:
    count = sum(each.requests.write for each in column.stats.queues)
    errors = sum(each.errors for each in column.stats.queues)
    return f"{_mib(_moved(column.stats))} in {count} requests, {errors} errors"


def _spread(column: Column) -> str:
    return " + ".join(f"{each.bytes.write / MIB:.0f}" for each in column.stats.queues) + " MiB"


def _copies(column: Column) -> str:
    moved = _moved(column.stats)
    kernel = _total(column.stats, "kernel_write_bytes") / moved
    return f"kernel {kernel:.2f}, ublkpool {_total(column.stats, 'own_copy_bytes') / moved:.2f}"


def _wrapped(text: str, indent: int) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > WIDTH - indent:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return f"\n{'':{indent}}".join(lines)


def _node(device: DeviceStatus) -> str:
    if device.state != "live" or device.path is None:
        raise Failure(f"{device.name} is {device.state}: {device.reason}")
    return device.path


def _answers(client: Client) -> bool:
    try:
        client.devices()
    except DaemonUnreachable:
        return False
    return True


def _wait_for(process: "subprocess.Popen[bytes]", condition: Callable[[], bool]) -> None:
    """Wait until the condition holds.  Raises `Failure` if the process ends first, or after the deadline."""
    deadline_s = time.monotonic() + START_DEADLINE_S
    while not condition():
        if process.poll() is not None:
            raise Failure(f"{_name(process)} ended with status {process.returncode}")
        if time.monotonic() > deadline_s:
            raise Failure(f"{_name(process)}: nothing came of it in {START_DEADLINE_S:.0f} s")
        time.sleep(0.05)


def _name(process: "subprocess.Popen[bytes]") -> str:
    arguments = process.args
    assert isinstance(arguments, list)
    return " ".join(arguments[3:5]) if "-m" in arguments else str(arguments[0])


def _end(process: "subprocess.Popen[bytes]", patience_s: float) -> None:
    for ask in (process.terminate, process.kill):
        if process.poll() is None:
            ask()
            try:
                process.wait(patience_s)
            except subprocess.TimeoutExpired:
                continue


def _run(*command: str) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMMAND_DEADLINE_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise Failure(f"{' '.join(command)}: no end after {COMMAND_DEADLINE_S:.0f} s") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise Failure(f"{' '.join(command)}: status {done.returncode}\n{said}")


def _files(tree: Path) -> list[Path]:
    return [each for each in tree.rglob("*") if each.is_file()]


def _traces() -> set[str]:
    """All files, devices and processes of ours that could be left on the machine."""
    patterns = (("/dev", "ublk[bc]*"), ("/dev/shm", "ublkpool-*"))
    return {str(path) for directory, pattern in patterns for path in Path(directory).glob(pattern)}


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / MIB:.1f} MiB"


def _title(text: str) -> None:
    print(f"\n{_bold(text)}\n", flush=True)


@contextmanager
def _step(command: str) -> Iterator[Callable[[str], None]]:
    """Show a command as a user would type it, then its result and how long it took."""
    said: list[str] = []
    started_s = time.monotonic()
    print(f"  $ {command}", flush=True)
    yield said.append
    took = f"{time.monotonic() - started_s:.1f} s"
    print(_dim(f"      {said[-1]:{WIDTH - 14}} {took:>7}"), flush=True)


def _bold(text: str) -> str:
    return f"\x1b[1m{text}\x1b[0m" if _in_colour() else text


def _dim(text: str) -> str:
    return f"\x1b[2m{text}\x1b[0m" if _in_colour() else text


def _in_colour() -> bool:
    # In a guest the output is a pipe; the Makefile passes whether it goes to a terminal.
    return os.environ.get("UBLKPOOL_COLOUR") == "1" or sys.stdout.isatty()


if __name__ == "__main__":
    main()
