"""The template of backends: what its children are, and what becomes of them if it or they die."""

import asyncio
import functools
import json
import logging
import os
import pwd
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from ublkpool.daemon.backends import template_process
from ublkpool.daemon.backends.backend_process import BackendProcess
from ublkpool.daemon.backends.template_process import BackendTemplate, Forked
from ublkpool.daemon.settings.config import BackendConfig

DEADLINE_S = 120
POLL_S = 0.01
GROUP = 7
MAPPING_BYTES_MAX = 1 << 30
FACTS = """
import gc, json, logging, os, resource, signal, sys, threading
from pathlib import Path

def readlink(fd):
    try:
        return os.readlink(f"/proc/self/fd/{fd}").partition(":")[0]
    except FileNotFoundError:
        return None

status = dict(line.split(":\\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
names = ("Umask", "Uid", "Gid", "Groups", "SigBlk", "SigIgn", "SigCgt", "CapInh", "CapPrm", "CapEff", "CapBnd",
         "CapAmb", "NoNewPrivs", "Threads", "VmLck")
open_ones = {fd: readlink(fd) for fd in os.listdir("/proc/self/fd")}
facts = {name: status[name].split() for name in names}
facts |= {
    "descriptors": {fd: target for fd, target in open_ones.items() if target},
    "leads its group": os.getpgid(0) == os.getpid(),
    "session": os.getsid(0),
    "parent": os.getppid(),
    "name": Path("/proc/self/comm").read_text(),
    "command line": Path("/proc/self/cmdline").read_bytes().rstrip(b"\\0").decode().split("\\0"),
    "owner": os.stat("/proc/self/fd").st_uid,
    "score": Path("/proc/self/oom_score_adj").read_text(),
    "limits": [resource.getrlimit(each) for each in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK)],
    "flusher": bool(int(Path("/proc/self/stat").read_text().rpartition(") ")[2].split()[6]) & 0x80000),
    "directory": os.getcwd(),
    "mounts": os.readlink("/proc/self/ns/mnt"),
    "environment": dict(os.environ),
    "argv": sys.argv,
    "path": sys.path,
    "handlers": [str(type(each)) for each in logging.getLogger().handlers],
    "stdout": str(type(sys.stdout)),
    "collects": gc.isenabled(),
    "Ctrl-C": str(signal.getsignal(signal.SIGINT)),
}
print("FACTS", json.dumps(facts), flush=True)
sys.exit(3)
"""


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test in a loop of its own."""

    @functools.wraps(test)
    def plain(*args: Any, **kwargs: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), DEADLINE_S))

    return plain


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every user can enter, which pytest's own is not."""
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o755)
        yield Path(made)


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("ublkpool"), "propagate", True)
    monkeypatch.setattr(template_process, "RESTART_MIN_S", 0.01)
    caplog.set_level(logging.INFO)
    return caplog


def complaints(heard: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in heard.records if each.levelno >= logging.WARNING]


async def until(condition: Callable[[], Any], what: str) -> None:
    """Return when it holds; the test's deadline is `in_a_loop`'s."""
    del what
    while not condition():
        await asyncio.sleep(POLL_S)


def process_of(template: BackendTemplate | None, place: Path, config: BackendConfig) -> BackendProcess:
    return BackendProcess("vol0", config, place, lambda _fd: None, None, GROUP, template)


async def ended(process: BackendProcess) -> tuple[int, bool]:
    """Start it and wait for its end: the status, and whether the template forked it."""
    await process.prepare()
    is_warm = process._forked is not None
    process.start()
    return await process.child.wait(), is_warm


@pytest.fixture
def children() -> Callable[[], list[int]]:
    """Tells which children this process has that it did not have before the test."""
    before = set(template_process._children())
    return lambda: [each for each in template_process._children() if each not in before]


async def forked(template: BackendTemplate) -> Forked:
    found = await template.fork()
    assert found is not None
    return found


async def facts_of(
    template: BackendTemplate | None, place: Path, config: BackendConfig, heard: pytest.LogCaptureFixture
) -> dict[str, Any]:
    process = process_of(template, place, config)
    heard.clear()
    status, is_warm = await ended(process)
    assert status == 3 or "SystemExit" in process.obituary(), process.obituary()
    assert is_warm == (template is not None)
    process.obituary()
    (line,) = [each.getMessage() for each in heard.records if "FACTS" in each.getMessage()]
    found: dict[str, Any] = json.loads(line.partition("FACTS ")[2])
    return found


@in_a_loop
async def test_a_child_of_the_template_is_as_a_program_that_the_daemon_has_started(
    place: Path, heard: pytest.LogCaptureFixture
) -> None:
    plugin = place / "facts.py"
    plugin.write_text(FACTS)
    config = BackendConfig(kind=str(plugin), options={"key": "value"}, cwd=str(place))
    template = BackendTemplate()
    by_exec = await facts_of(None, place, config, heard)
    copied = await facts_of(template, place, config, heard)
    assert copied == by_exec
    assert copied["parent"] == os.getpid()
    assert set(copied["descriptors"]) == {"0", "1", "2"}
    assert copied["command line"][1:4] == ["-m", "ublkpool.daemon", "backend"]
    await template.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs a backend as another user")
@in_a_loop
async def test_a_child_with_a_user_has_its_rights_and_no_descriptor_of_another(
    place: Path, heard: pytest.LogCaptureFixture
) -> None:
    plugin = place / "mine.py"
    plugin.write_text("import signal\nprint('runs', flush=True)\nsignal.pause()")
    template = BackendTemplate()
    process = process_of(
        template, place, BackendConfig(kind=str(plugin), user="nobody", cwd=str(place), options={"a": "b"})
    )
    await process.prepare()
    assert process._forked is not None
    process.start()
    pid, user = process.child.pid, pwd.getpwnam("nobody").pw_uid
    await until(lambda: "vol0: runs" in heard.text, "the plugin runs")
    shown = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    assert {*shown["Uid"].split(), *shown["Gid"].split()} == {str(user)}
    assert str(GROUP) in shown["Groups"].split() and "0" not in shown["Groups"].split()
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(shown[name], 16) == 0, name
    assert shown["NoNewPrivs"] == "1" and shown["Threads"] == "1"
    seen = await asyncio.to_thread(_seen_from_outside, pid)
    assert seen["descriptors"] == {"0": "/dev/null", "1": "pipe", "2": "pipe"}
    # It is its user's own, as after an exec.
    assert seen["owner"] == user
    await process.child.kill()
    await template.stop()


def _seen_from_outside(pid: int) -> dict[str, Any]:
    directory = Path(f"/proc/{pid}/fd")
    return {
        "descriptors": {each.name: str(each.readlink()).partition(":")[0] for each in directory.iterdir()},
        "owner": directory.stat().st_uid,
    }


@in_a_loop
async def test_a_child_ends_as_a_child_of_the_daemon(place: Path, heard: pytest.LogCaptureFixture) -> None:
    template = BackendTemplate()
    process = process_of(template, place, BackendConfig(kind="nosuch"))
    assert await ended(process) == (2, True)
    assert process.obituary().startswith("backend nosuch ended: exit status 2: no backend is called 'nosuch'")
    plugin = place / "mine.py"
    plugin.write_text("import signal\nsignal.pause()")
    process = process_of(template, place, BackendConfig(kind=str(plugin)))
    await process.prepare()
    process.start()
    process.child.send(signal.SIGKILL)
    assert await process.child.wait() == 128 + signal.SIGKILL
    gone = process_of(template, place, BackendConfig(kind="null", cwd=str(place / "gone")))
    assert await ended(gone) == (1, True)
    assert "cannot start it" in gone.obituary() and str(place / "gone") in gone.obituary()
    await template.stop()
    assert [each for each in complaints(heard) if "template" in each] == []


@in_a_loop
async def test_another_interpreter_s_backend_is_not_the_template_s_child(place: Path) -> None:
    template = BackendTemplate()
    process = process_of(template, place, BackendConfig(kind="nosuch", python=sys.executable))
    assert await ended(process) == (2, False)
    assert template.pid is None


@in_a_loop
async def test_nothing_of_a_device_reaches_the_template(place: Path, heard: pytest.LogCaptureFixture) -> None:
    secret = os.urandom(16).hex()
    template = BackendTemplate()
    assert await ended(
        process_of(template, place, BackendConfig(kind="nosuch", options={"key": secret}))
    ) == (2, True)
    assert template.pid is not None
    memory = await asyncio.to_thread(_memory, template.pid)
    assert secret.encode() not in memory and b"ublkpool.backends.null" in memory
    assert len((await asyncio.to_thread(_seen_from_outside, template.pid))["descriptors"]) == 4
    await template.stop()


def _memory(pid: int) -> bytes:
    found = bytearray()
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            ends, rights = line.split()[:2]
            start, end = (int(each, 16) for each in ends.split("-"))
            # A larger one is AddressSanitizer's shadow, of terabytes.
            if rights.startswith("rw") and end - start <= MAPPING_BYTES_MAX:
                memory.seek(start)
                found += memory.read(end - start)
    return bytes(found)


@in_a_loop
async def test_a_child_that_dies_before_its_task_is_replaced_by_exec(place: Path) -> None:
    template = BackendTemplate()
    process = process_of(template, place, BackendConfig(kind="nosuch"))
    await process.prepare()
    assert process._forked is not None
    dead = process._forked.child
    dead.send(signal.SIGKILL)
    assert await dead.wait() == 128 + signal.SIGKILL
    process.start()
    assert process.child is not dead
    assert await process.child.wait() == 2
    await template.stop()


@in_a_loop
async def test_a_template_that_dies_while_it_is_asked_costs_a_start_by_exec_and_one_line(
    place: Path, heard: pytest.LogCaptureFixture
) -> None:
    template = BackendTemplate()
    (await forked(template)).close()
    first = template.pid
    assert first is not None
    os.kill(first, signal.SIGSTOP)
    process = process_of(template, place, BackendConfig(kind="nosuch"))
    preparing = asyncio.ensure_future(process.prepare())
    await until(lambda: template._asked, "it is asked")
    os.kill(first, signal.SIGKILL)
    await preparing
    assert process._forked is None
    process.start()
    assert await process.child.wait() == 2
    await until(lambda: template.pid not in (None, first), "another runs")
    assert await ended(process_of(template, place, BackendConfig(kind="nosuch"))) == (2, True)
    said = [each for each in complaints(heard) if "template" in each]
    assert len(said) == 1 and "killed by SIGKILL" in said[0] and "Python" in said[0]
    await template.stop()


@in_a_loop
async def test_a_child_that_the_template_could_not_tell_of_is_reaped(
    heard: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, children: Callable[[], list[int]]
) -> None:
    template = BackendTemplate()
    (await forked(template)).close()
    first = template.pid
    assert first is not None
    await until(lambda: children() == [first], "the first child is reaped")
    # The answer is not read: as from a template that died before it.
    with monkeypatch.context() as patch:
        patch.setattr(template, "_take", lambda _packet: None)
        asking = asyncio.ensure_future(template.fork())
        await until(lambda: len(children()) == 2, "it has forked")
        os.kill(first, signal.SIGKILL)
        assert await asking is None
        await until(lambda: template.pid not in (None, first), "another runs")
    await until(lambda: children() == [template.pid], "no child is left")
    await template.stop()
    assert children() == []


@in_a_loop
async def test_a_backend_that_waits_no_longer_leaves_no_process(children: Callable[[], list[int]]) -> None:
    template = BackendTemplate()
    asking = asyncio.ensure_future(template.fork())
    await until(lambda: template._asked, "it is asked")
    asking.cancel()
    await until(lambda: template._is_ready and not template._asked, "it has answered")
    await until(lambda: children() == [template.pid], "no child is left")
    prepared = BackendProcess(
        "vol", BackendConfig(kind="null"), Path("/nowhere"), lambda _fd: None, template=template
    )
    await prepared.prepare()
    prepared.drop_prepared()
    await until(lambda: children() == [template.pid], "no child is left")
    await template.stop()


@in_a_loop
async def test_a_silent_template_is_replaced(
    heard: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = BackendTemplate()
    (await forked(template)).close()
    first = template.pid
    assert first is not None
    monkeypatch.setattr(template_process, "ANSWER_S", 0.2)
    os.kill(first, signal.SIGSTOP)
    assert await template.fork() is None
    monkeypatch.undo()
    await until(lambda: template.pid not in (None, first), "another runs")
    await until(lambda: template._is_ready, "it is ready")
    (await forked(template)).close()
    await template.stop()


@pytest.mark.parametrize("program", ["#!/bin/sh\necho 'ublkpool: broken' >&2; exit 3\n", None])
@in_a_loop
async def test_without_a_template_that_can_start_the_log_says_so_once(
    place: Path, heard: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, program: str | None
) -> None:
    python = place / "python"
    if program is not None:
        python.write_text(program)
        python.chmod(0o755)
    template = BackendTemplate()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(python))
        assert await template.fork() is None
        await until(lambda: complaints(heard), "it has ended")
        assert await template.fork() is None
        template.child.send(signal.SIGKILL)
        await until(lambda: template._pauses._next_s > 0.2, "it has been tried again and again")
    why = "broken" if program is not None else "No such file"
    said = [each for each in complaints(heard) if "Python" in each]
    assert len(said) == 1 and why in said[0], complaints(heard)
    await template.stop()


_DAEMON = """
import asyncio, os, signal, sys
from ublkpool.daemon.backends.template_process import BackendTemplate

async def main():
    template = BackendTemplate()
    assert await template.fork() is not None
    print("asked", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def test_the_template_and_its_idle_child_end_with_the_daemon() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _DAEMON], stdout=subprocess.PIPE, start_new_session=True
    ) as daemon:
        assert daemon.wait(DEADLINE_S) == -signal.SIGKILL
        assert daemon.stdout is not None and daemon.stdout.read() == b"asked\n"
        until_s = time.monotonic() + DEADLINE_S
        while left := _of_session(daemon.pid):
            assert time.monotonic() < until_s, f"still there: {left}"
            time.sleep(0.02)


def _of_session(session: int) -> list[int]:
    found = []
    for each in (path.name for path in Path("/proc").iterdir() if path.name.isdigit()):
        try:
            if os.getsid(int(each)) == session:
                found.append(int(each))
        except ProcessLookupError:
            continue
    return found


_OWN_VIEW = """
import asyncio, os, subprocess, sys
from pathlib import Path
from ublkpool.daemon.backends.backend_process import BackendProcess
from ublkpool.daemon.backends.template_process import BackendTemplate
from ublkpool.daemon.processes import mounts
from ublkpool.daemon.settings.config import BackendConfig

root = sys.argv[1]
PLUGIN = "import os; raise RuntimeError(os.readlink('/proc/self/ns/mnt') + ' at ' + os.getcwd())"

def mount(where):
    Path(where).mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "t", where], check=True)

async def main():
    mount(f"{root}/early")
    live = mounts.leave_for_own_view([Path(f"{root}/run")])
    theirs = os.readlink(f"/proc/self/fd/{live}")
    template = BackendTemplate(live)
    (await template.fork()).close()
    if (pid := os.fork()) == 0:
        mounts.enter_live_view(live, "/")
        subprocess.run(["umount", f"{root}/early"], check=True)
        mount(f"{root}/late")
        Path(f"{root}/late/mine.py").write_text(PLUGIN)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    config = BackendConfig(kind=f"{root}/late/mine.py", cwd=f"{root}/late")
    process = BackendProcess("vol", config, Path(root), lambda fd: None, live, None, template)
    await process.prepare()
    assert process._forked is not None and not Path(config.kind).exists()
    process.start()
    assert await process.child.wait() == 2
    assert process.obituary().endswith(f"{theirs} at {root}/late"), process.obituary()
    await template.stop()

asyncio.run(main())
"""


def test_a_copy_sees_the_operator_s_mounts_of_now_and_the_template_pins_none(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("may not make mount namespaces; the vm tests do")
    command = ["unshare", "-m", sys.executable, "-c", _OWN_VIEW, str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DEADLINE_S)
    assert ran.returncode == 0, ran.stderr
