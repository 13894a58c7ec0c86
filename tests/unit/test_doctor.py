"""The doctor as a whole: the daemon and what dead ones left, checks that hang or break off, and its command."""

import asyncio
import json
import os
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import pytest
from click.testing import CliRunner, Result

from support.fakes.daemon import running_daemon
from ublkpool.daemon.cli.commands import cli
from ublkpool.daemon.device.records import Record, Records, Worker
from ublkpool.daemon.doctor import examination, probes
from ublkpool.daemon.doctor.daemon import DaemonAnswer, ask_daemon, daemon_findings
from ublkpool.daemon.doctor.examination import checks, examine
from ublkpool.daemon.doctor.features import Offered
from ublkpool.daemon.doctor.finding import Finding, Report, report_of
from ublkpool.daemon.doctor.leftovers import (
    Recorded,
    leftover_findings,
    lost_findings,
    read_records,
    version_findings,
)
from ublkpool.daemon.doctor.probes import Probes, running_probes
from ublkpool.daemon.doctor.rights import rights_findings
from ublkpool.daemon.doctor.system import System, instance_of
from ublkpool.daemon.kernel.device_commands import Owned
from ublkpool.daemon.processes.left_behind import Process, Role
from ublkpool.daemon.settings.config import BackendConfig, DeviceConfig
from ublkpool.ublk.abi import DeviceState
from ublkpool.ublk.errors import UblkError

GONE, DEAD = DaemonAnswer("absent"), DaemonAnswer("dead")
PATIENT_S = 120.0
"""The deadline of checks that shall not reach it."""


def worker(pid: int) -> Worker:
    return Worker(Process("worker", pid, 1), None)


def device(name: str, **fields: Any) -> Record:
    return Record(config=DeviceConfig(name=name), **fields)


def the_one(findings: Sequence[Finding], level: str, *words: str) -> Finding:
    """The only finding, which has this level, these words, and a way out unless all is well."""
    (found,) = findings
    assert found.level == level, found
    assert all(word in f"{found.says} {found.way_out}" for word in words), found
    assert bool(found.way_out) == (level != "ok"), found
    return found


def lives(process: Process) -> bool:
    return process.pid < 100


def test_records_are_read_and_left_as_they_are(tmp_path: Path) -> None:
    assert read_records(tmp_path) == Recorded()
    Records(tmp_path / "devices").save(device("vol0", device_number=3))
    (tmp_path / "devices" / "vol1.json").write_text("{")
    (tmp_path / "devices" / "vol2.unreadable").write_text("{")
    before = sorted(each.name for each in (tmp_path / "devices").iterdir())
    recorded = read_records(tmp_path)
    assert [each.config.name for each in recorded.records] == ["vol0"]
    assert sorted(recorded.unreadable) == ["vol1.json", "vol2.unreadable"] and not recorded.denied
    assert sorted(each.name for each in (tmp_path / "devices").iterdir()) == before


def test_records_that_may_not_be_read_are_not_taken_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> NoReturn:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    recorded = read_records(tmp_path)
    assert recorded.denied
    the_one(leftover_findings(tmp_path, GONE, recorded, lives), "warn", "cannot be read", "sudo")
    the_one(lost_findings(list, lambda: recorded, True), "warn", "not known")


@pytest.mark.parametrize("answer", [GONE, DEAD])
def test_devices_without_a_daemon_are_told_by_their_workers(tmp_path: Path, answer: DaemonAnswer) -> None:
    records = [
        device("fine", live=True, workers=(worker(1), worker(2))),
        device("half", live=True, workers=(worker(1), worker(101))),
        device("none", live=True),
        device("made", workers=(worker(1),)),
    ]
    unserved, served = leftover_findings(tmp_path, answer, Recorded(records), lives)
    the_one([unserved], "fail", "half, none, made", f"ublkpool serve --run-dir {tmp_path}")
    the_one([served], "warn", "fine", f"ublkpool serve --run-dir {tmp_path}")
    assert "fine" not in unserved.says


@pytest.mark.parametrize("state", ["answers", "silent", "hidden"])
def test_records_are_no_leftovers_while_a_daemon_runs(tmp_path: Path, state: Any) -> None:
    recorded = Recorded([device("none", live=True)])
    the_one(leftover_findings(tmp_path, DaemonAnswer(state), recorded, lives), "ok")


def test_sockets_and_damaged_records_are_leftovers(tmp_path: Path) -> None:
    the_one(leftover_findings(tmp_path, GONE, Recorded(), lives), "ok")
    the_one(leftover_findings(tmp_path, DEAD, Recorded(), lives), "warn", "sockets")
    damaged = Recorded(unreadable=["vol0.unreadable"])
    the_one(leftover_findings(tmp_path, GONE, damaged, lives), "warn", "vol0.unreadable")


def lost(*looks: Sequence[Owned], marks: Sequence[int] = (7,)) -> list[Finding]:
    answers = iter(looks)
    records = [device(f"vol{mark}", device_mark=mark) for mark in marks]
    return lost_findings(lambda: next(answers), lambda: Recorded(records), True)


def test_a_kernel_device_on_no_record_is_lost_if_it_stays() -> None:
    known, stray = Owned(0, 7, 70, DeviceState.LIVE), Owned(3, 8, 70, DeviceState.QUIESCED)
    the_one(lost([known]), "ok")
    the_one(lost([known, stray], [known, stray]), "fail", "device 3", "/dev/ublkb3", "ublkpool del lost-3")
    the_one(lost([known, stray], [known]), "ok")
    dead = stray._replace(state=DeviceState.DEAD)
    the_one(lost([dead], [dead]), "warn", "no disk", "lost-3")
    the_one(lost_findings(lambda: [stray], Recorded, False), "warn", "not known")


def test_workers_of_other_code_are_named() -> None:
    records = [
        device("old", workers=(worker(1),), build="aaaa"),
        device("new", workers=(worker(1),), build="bbbb"),
        device("unknown", workers=(worker(1),)),
        device("unserved", build="aaaa"),
    ]
    code, other = version_findings(Recorded(records), "bbbb")
    the_one([code], "ok", "ublkpool 0.1.0", "code bbbb", "Python 3.")
    the_one([other], "warn", "(aaaa)", ": old", "--replace")
    assert "unserved" not in other.says and "unknown" not in other.says
    the_one(version_findings(Recorded(records[1:]), "bbbb"), "ok")


def test_a_daemon_that_answers_is_counted_with_its_failed_devices(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon:
        for name, state in (("vol0", "live"), ("vol1", "failed")):
            daemon.service.configs[name] = DeviceConfig(name=name, backend=BackendConfig(kind="memory"))
            daemon.service.states[name] = state  # type: ignore[assignment]
        answer = ask_daemon(tmp_path, PATIENT_S)
    assert answer == DaemonAnswer("answers", os.getpid(), count=2, failed=("vol1: ",))
    fine, failed = daemon_findings(tmp_path, answer)
    the_one([fine], "ok", f"process {os.getpid()}", "2 devices")
    the_one([failed], "fail", "vol1", "ublkpool list")


def test_a_daemon_that_is_gone_is_told_from_a_dead_one(tmp_path: Path) -> None:
    assert ask_daemon(tmp_path).state == "absent"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "admin.sock"))
    assert ask_daemon(tmp_path).state == "dead"
    for answer in (GONE, DEAD):
        the_one(daemon_findings(tmp_path, answer), "ok", "no daemon runs")


def test_a_daemon_that_answers_nothing_is_asked_for_a_bounded_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ublkpool.daemon.admin.patience.STOPPED_NOTICE_S", 0.02)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "admin.sock"))
        listener.listen()
        answer = ask_daemon(tmp_path, 0.05)
    assert (answer.state, answer.pid) == ("silent", os.getpid())
    the_one(daemon_findings(tmp_path, answer), "fail", "did not answer within 0.05 s", "ublkpool serve")


def test_a_daemon_whose_socket_was_removed_is_found(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "admin.sock"))
        listener.listen()
        (tmp_path / "admin.sock").unlink()
        answer = ask_daemon(tmp_path)
    assert answer.state == "silent" and f"process {os.getpid()}" in answer.says


def test_a_daemon_of_another_user_is_not_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> NoReturn:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("ublkpool.daemon.doctor.daemon._listener", refuse)
    answer = ask_daemon(tmp_path)
    the_one(daemon_findings(tmp_path, answer), "warn", "permission denied", "sudo")


def test_who_serves_as_root_or_with_capabilities_is_named(system: System) -> None:
    def shown(pid: int, user: int, held: int) -> None:
        (system.root / f"proc/{pid}").mkdir(parents=True, exist_ok=True)
        text = f"Name:\tx\nUid:\t{user}\t{user}\t{user}\t{user}\nCapEff:\t{held:016x}\n"
        (system.root / f"proc/{pid}/status").write_text(text)

    def found() -> list[Finding]:
        return rights_findings(system, Recorded([record]), lives)

    roles: tuple[Role, ...] = ("worker", "broker", "backend", "worker")
    processes = [Process(role, pid, 0) for role, pid in zip(roles, (7, 8, 9, 100), strict=True)]
    record = device("vol0", processes=tuple(processes))
    the_one(rights_findings(system, Recorded(), lives), "ok")
    # The backend has a user of its own or not, and the last one has ended.
    for pid, user in ((7, 998), (8, 998), (9, 0), (100, 0)):
        shown(pid, user, 0)
    the_one(found(), "ok")
    shown(7, 0, 0)
    the_one(
        found(), "warn", "are root, without its capabilities: worker 7", "useradd --system", "ublkpool-worker"
    )
    shown(7, 998, 1)
    the_one(found(), "warn", "have capabilities: worker 7", "restart the daemon")
    shown(7, 0, 1)
    shown(8, 0, 0)
    assert [each.says.rpartition(": ")[2] for each in found()] == ["worker 7", "broker 8"]


@pytest.fixture
def system(tmp_path: Path) -> System:
    """A machine of which nothing is known."""
    (tmp_path / "root/dev/shm").mkdir(parents=True)
    return System(tmp_path / "root", tmp_path / "run", (tmp_path / "state",), "7.3.4", True)


def fakes() -> Probes:
    return Probes(lambda: Offered(0x1FFFFF), lambda _: GONE, lambda _: [], lives, lambda: "cafe")


ALL = Offered(0x1FFFFF)
CHECKS = [
    *("kernel", "driver", "features", "known-kernels", "io_uring", "limits", "udev"),
    *("run-directory", "state-directory", "shm", "daemon", "leftovers", "rights", "lost-devices", "versions"),
]


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


async def examined(system: System, asked: Probes, deadline_s: float) -> Report:
    """The report, when every process that a check left behind has ended."""
    before = children()
    report = await examine(system, asked, deadline_s)
    while children() - before:
        await asyncio.sleep(0.01)
    return report


def run(system: System, asked: Probes, deadline_s: float = PATIENT_S) -> dict[str, list[Finding]]:
    """The findings of a whole examination, by check."""
    found: dict[str, list[Finding]] = {}
    for each in asyncio.run(examined(system, asked, deadline_s)).findings:
        found.setdefault(each.check, []).append(each)
    return found


def check(system: System, name: str, asked: Probes, offered: Offered, answer: DaemonAnswer) -> list[Finding]:
    """The findings of one check, in this process."""
    return dict(checks(system, asked, offered, answer))[name]()


def test_every_check_has_its_finding_in_order_and_nothing_is_made(system: System, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    found = run(system, fakes())
    assert list(found) == CHECKS
    assert sorted(tmp_path.rglob("*")) == before
    assert "code cafe" in found["versions"][0].says


def hang(*_: object) -> NoReturn:
    while True:
        signal.pause()


def test_checks_that_hang_are_given_up_and_named(system: System) -> None:
    found = run(system, fakes()._replace(features=hang, daemon=hang, build=hang), 0.3)
    assert list(found) == CHECKS
    for name in ("features", "daemon", "versions"):
        (finding,) = found[name]
        assert finding.level == "fail" and "has hung" in finding.says


def test_a_check_that_breaks_off_is_named_in_one_line(system: System) -> None:
    def broken() -> str:
        raise ValueError("two\nlines \udcff")

    found = run(system, fakes()._replace(build=broken))
    finding = the_one(found["versions"], "fail", "broke off", "ValueError")
    assert "\n" not in finding.says and list(found) == CHECKS


def test_a_name_that_no_text_can_hold_is_shown_with_a_question_mark(system: System) -> None:
    (state,) = system.state_dirs
    state.mkdir(0o700)
    Path(os.fsdecode(bytes(state) + b"/\xff\n.json")).touch()
    found = run(system, fakes())["state-directory"]
    assert "??.json" in found[-1].says and found[-1].level == "fail"


def test_lost_devices_are_looked_for_only_where_the_driver_tells(system: System) -> None:
    def owned(instance: str) -> list[Owned]:
        return [Owned(3, 8, 70, DeviceState.LIVE)] if instance == instance_of(system.run_dir) else []

    def found(system: System, offered: Offered) -> list[Finding]:
        return check(system, "lost-devices", fakes()._replace(owned=owned), offered, GONE)

    the_one(found(system, ALL), "fail", "lost-3")
    (system.root / "sys/class/ublk-char/ublkc3").mkdir(parents=True)
    the_one(found(system, ALL), "fail", "lost-3")
    the_one(found(system._replace(is_root=False), ALL), "warn", "not known")
    the_one(found(system, Offered(None, "no", 13)), "warn", "not known")


def test_the_limits_are_of_the_daemon_that_runs(system: System) -> None:
    def limits(pid: int) -> str:
        return check(system, "limits", fakes(), ALL, DaemonAnswer("answers", pid))[0].says

    assert limits(7) == "the limits of the daemon cannot be read"
    assert limits(0) == "the limits of this shell cannot be read"


def test_pools_are_judged_by_the_records(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (0, 1):
        (system.root / f"dev/shm/ublkpool-{instance_of(system.run_dir)}-{number}-ctl").touch()
    assert "-0-ctl" in check(system, "shm", fakes(), ALL, GONE)[-1].says
    (system.run_dir / "devices").mkdir(0o700, parents=True)
    Records(system.run_dir / "devices").save(device("vol0", device_number=0))
    found = check(system, "shm", fakes(), ALL, GONE)
    (finding,) = (each for each in found if "ublkpool-" in each.says)
    assert "-1-ctl" in finding.says and "-0-ctl" not in finding.says
    assert len(check(system, "shm", fakes(), ALL, DaemonAnswer("answers"))) == 1
    monkeypatch.setattr(examination, "read_records", lambda _: Recorded(denied=True))
    assert len(check(system, "shm", fakes(), ALL, GONE)) == 1


def test_the_kernel_s_version_is_ubuntu_s_upstream_one(system: System) -> None:
    (system.root / "proc").mkdir()
    (system.root / "proc/version_signature").write_text("Ubuntu 7.0.0-31.31-generic 7.0.14\n")
    ubuntu = system._replace(release="7.0.0-31-generic")
    assert "never returned" in check(ubuntu, "known-kernels", fakes(), ALL, GONE)[0].says


def test_the_driver_s_error_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise UblkError("/dev/ublk-control", 2)

    monkeypatch.setattr(probes, "get_features", refuse)
    offered = running_probes().features()
    assert (offered.bits, offered.errno) == (None, 2) and "modprobe" in offered.error
    monkeypatch.setattr(probes, "get_features", lambda: 6)
    assert running_probes().features() == Offered(6)


def command(monkeypatch: pytest.MonkeyPatch, findings: Sequence[Finding], *args: str) -> Result:
    async def examined(system: System, asked: Probes) -> Report:
        return report_of(findings)

    monkeypatch.setattr(examination, "examine", examined)
    return CliRunner().invoke(cli, ["doctor", *args])


FINE = Finding("kernel", "ok", "Linux 7.3.4")
ODD = Finding("known-kernels", "warn", "it may hang", "boot another", ("https://one", "docs/LANDMINES.md"))
BAD = Finding("driver", "fail", "it is not there", "modprobe ublk_drv")


@pytest.mark.parametrize(("findings", "status"), [([FINE], 0), ([FINE, ODD], 0), ([BAD, FINE], 1)])
def test_only_a_failure_is_status_1(
    monkeypatch: pytest.MonkeyPatch, findings: Sequence[Finding], status: int
) -> None:
    for args in ((), ("--json",)):
        result = command(monkeypatch, findings, *args)
        assert (result.exit_code, result.stderr) == (status, "")


def test_each_finding_is_a_line_with_its_way_out_below(monkeypatch: pytest.MonkeyPatch) -> None:
    assert command(monkeypatch, [FINE, ODD, BAD]).stdout == (
        "ok    kernel: Linux 7.3.4\n"
        "warn  known-kernels: it may hang\n"
        "      way out: boot another\n"
        "      see: https://one docs/LANDMINES.md\n"
        "fail  driver: it is not there\n"
        "      way out: modprobe ublk_drv\n"
        "ok: 1, warnings: 1, failures: 1\n"
    )


def test_json_has_the_worst_level_and_every_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = json.loads(command(monkeypatch, [FINE, BAD], "--json").stdout)
    assert shown == {
        "level": "fail",
        "findings": [json.loads(msgspec.json.encode(each)) for each in (FINE, BAD)],
    }
    assert list(shown["findings"][0]) == ["check", "level", "says", "way_out", "sources"]


def test_the_command_examines_the_directories_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[System] = []

    async def examined(system: System, asked: Probes) -> Report:
        seen.append(system)
        return Report("ok", [])

    monkeypatch.setattr(examination, "examine", examined)
    run_dir, state_dir = str(tmp_path / "r"), str(tmp_path / "s")
    assert CliRunner().invoke(cli, ["doctor", "--run-dir", run_dir, "--state-dir", state_dir]).exit_code == 0
    assert CliRunner().invoke(cli, ["doctor", "--run-dir", run_dir]).exit_code == 0
    assert [str(each.run_dir) for each in seen] == [run_dir] * 2
    assert seen[0].state_dirs == (Path(state_dir),)
    assert seen[1].state_dirs[0] == Path("/var/lib/ublkpool/at") / run_dir.lstrip("/")
    assert seen[0].root == Path("/") and seen[0].release == os.uname().release


def test_the_doctor_works_on_this_machine_whatever_it_is(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["doctor", "--json", "--run-dir", str(tmp_path / "run")])
    assert result.stderr == "" and result.exit_code in (0, 1)
    shown = msgspec.json.decode(result.stdout, type=Report)
    assert list(dict.fromkeys(each.check for each in shown.findings)) == CHECKS
    assert (result.exit_code == 1) == (shown.level == "fail")
    assert not any("broke off" in each.says for each in shown.findings)
    assert all(each.way_out for each in shown.findings if each.level != "ok")
    assert list(tmp_path.iterdir()) == []
