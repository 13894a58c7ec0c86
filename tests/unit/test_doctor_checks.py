"""The doctor's checks of the machine, each on a tree of files made for it."""

import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from ublkpool.bufpool.pool.arena import arena_prefix
from ublkpool.daemon.doctor import kernel
from ublkpool.daemon.doctor.directories import (
    run_directory_findings,
    shm_findings,
    state_directory_findings,
)
from ublkpool.daemon.doctor.features import NEEDS, Offered, feature_findings
from ublkpool.daemon.doctor.finding import Finding, printable, report_of, some
from ublkpool.daemon.doctor.kernel import (
    control_finding,
    driver_findings,
    io_uring_findings,
    kernel_findings,
)
from ublkpool.daemon.doctor.known_kernels import PROBLEMS, known_kernel_findings
from ublkpool.daemon.doctor.limits import Limited, limit_findings
from ublkpool.daemon.doctor.release import Release, parse_release
from ublkpool.daemon.doctor.system import System, instance_of
from ublkpool.daemon.doctor.udev import udev_findings
from ublkpool.daemon.settings import own_directory
from ublkpool.ublk.abi import Feature

GIB = 1 << 30
SIX_12, SEVEN_3 = 0x1FE, 0x1FFFFF
"""GET_FEATURES of Debian's 6.12 and 7.3."""


@pytest.fixture
def system(tmp_path: Path) -> System:
    """An empty machine."""
    return System(
        tmp_path / "root", tmp_path / "run", (tmp_path / "state",), "6.12.107+deb13-cloud-amd64", True
    )


def write(system: System, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = system.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def release(text: str, signature: str = "") -> Release:
    found = parse_release(text, signature)
    assert found is not None
    return found


def levels(findings: Sequence[Finding]) -> list[str]:
    return [each.level for each in findings]


def the_one(findings: Sequence[Finding], level: str, *words: str) -> Finding:
    """The only finding, which has this level, these words, and a way out unless all is well."""
    (found,) = findings
    assert found.level == level, found
    assert all(word in f"{found.says} {found.way_out}" for word in words), found
    assert bool(found.way_out) == (level != "ok"), found
    return found


def room(free: int, flags: int = 0) -> Callable[[Path], os.statvfs_result]:
    return lambda path: os.statvfs_result((1, 1, 1 << 40, free, free, 100, 100, 100, flags, 255))


@pytest.mark.parametrize(
    ("text", "signature", "expected"),
    [
        ("6.12.107+deb13-cloud-amd64", "", Release("6.12.107+deb13-cloud-amd64", (6, 12, 107))),
        ("6.17.0-1015-azure", "", Release("6.17.0-1015-azure", (6, 17, 0), 1015, "azure")),
        (
            "7.0.0-28-generic",
            "Ubuntu 7.0.0-28.28~24.04.1-generic 7.0.14",
            Release("7.0.0-28-generic", (7, 0, 14), 28, "generic"),
        ),
        ("7.3.0-rc2", "", Release("7.3.0-rc2", (7, 3, 0), candidate=2)),
        ("7.3", "", Release("7.3", (7, 3, 0))),
        ("6.12.1", "another text", Release("6.12.1", (6, 12, 1))),
    ],
)
def test_a_release_is_understood(text: str, signature: str, expected: Release) -> None:
    assert parse_release(text, signature) == expected


def test_an_old_or_strange_kernel_is_a_warning(system: System) -> None:
    the_one(kernel_findings(system, release("6.12.0")), "ok", "Linux 6.12.0")
    the_one(kernel_findings(system, release("6.11.99")), "warn", "older than 6.12")
    assert parse_release("Darwin") is None
    the_one(kernel_findings(system._replace(release="Darwin"), None), "warn", "Darwin")


@pytest.mark.parametrize(
    ("text", "level", "words"),
    [
        ("6.18.3", "ok", ""),
        ("6.18.4-arch1-1", "fail", "ADD_DEV"),
        ("6.18.5", "fail", "6.18.6"),
        ("6.18.6", "ok", ""),
        ("6.17.0-1015-azure", "fail", "ublk_init_queues"),
        ("6.17.0-1017-aws", "fail", "panics"),
        ("6.17.0-1018-azure", "fail", "ADD_DEV"),
        ("6.17.0-1019-azure", "warn", "no source"),
        ("6.17.0-1008-aws", "warn", "no source"),
        ("6.17.0-1015-gcp", "ok", ""),
        ("6.17.0-7-generic", "ok", ""),
        ("6.18.39", "ok", ""),
        ("6.18.40", "warn", "never returned"),
        ("6.18.41", "ok", ""),
        ("7.0.14", "warn", "never returned"),
        ("7.0.0-28-generic", "warn", "never returned"),
        ("7.0.0-29-generic", "ok", "BATCH_IO"),
        ("7.0.13", "ok", "BATCH_IO"),
        ("7.2.6", "ok", "BATCH_IO"),
        ("7.2.7", "ok", "no defect"),
        ("7.3.0-rc2", "ok", "BATCH_IO"),
        ("7.3.0-rc3", "ok", "no defect"),
        ("7.3.4", "ok", "no defect"),
        ("6.12.107", "warn", "30 s"),
        ("6.15.9", "warn", "30 s"),
        ("6.16.0", "ok", "no defect"),
    ],
)
def test_a_known_kernel_is_named(text: str, level: str, words: str) -> None:
    findings = known_kernel_findings(release(text), None)
    assert report_of(findings).level == level
    assert words in " ".join(each.says + each.way_out for each in findings)
    assert all(each.sources for each in findings if each.level != "ok")


def test_a_defect_that_a_feature_rules_out_is_not_named() -> None:
    assert levels(known_kernel_findings(release("5.14.0-611.el9"), SIX_12)) == ["warn"]
    the_one(known_kernel_findings(release("5.14.0-611.el9"), SEVEN_3), "ok", "no defect")
    the_one(known_kernel_findings(None, None), "ok")


def test_every_known_defect_has_a_source_and_a_way_out() -> None:
    for each in PROBLEMS:
        assert each.sources and all(source.startswith(("https://", "docs/")) for source in each.sources)
        assert each.way_out or each.level == "ok"


def test_a_driver_that_is_loaded(system: System) -> None:
    write(system, {"sys/module/ublk_drv/parameters/ublks_max": "64"})
    findings = driver_findings(system)
    assert levels(findings) == ["ok", "fail"] and "/dev/ublk-control is not there" in findings[1].says
    write(system, {"dev/ublk-control": ""})
    assert "no character device" in driver_findings(system)[1].says


def test_the_control_device_is_for_its_owner_alone() -> None:
    the_one([control_finding(stat.S_IFCHR | 0o600)], "ok")
    the_one([control_finding(stat.S_IFCHR | 0o660)], "warn", "0660", "99-ublkpool.rules")
    the_one([control_finding(stat.S_IFREG | 0o600)], "fail")


def test_the_control_device_is_a_groups_where_the_rules_for_users_say_so(system: System) -> None:
    the_one([control_finding(stat.S_IFCHR | 0o660, lets_users_in=True)], "ok", "99-ublkpool.users.rules")
    the_one([control_finding(stat.S_IFCHR | 0o666, lets_users_in=True)], "warn", "0666")
    assert not kernel._lets_users_in(system)
    write(system, {"etc/udev/rules.d/99-ublkpool.users.rules": ""})
    assert kernel._lets_users_in(system)


def test_a_driver_that_can_be_loaded(system: System) -> None:
    modules = f"lib/modules/{system.release}"
    the_one(driver_findings(system), "fail", "has no modules", "outside of this container")
    write(system, {f"{modules}/modules.dep": "kernel/drivers/block/nbd.ko.xz:\n"})
    the_one(driver_findings(system), "fail", "no ublk driver", "CONFIG_BLK_DEV_UBLK")
    write(system, {f"{modules}/modules.dep": "kernel/drivers/block/ublk_drv.ko.xz:\n"})
    the_one(driver_findings(system), "warn", "modprobe ublk_drv")


@pytest.mark.parametrize(
    ("disabled", "is_root", "level"),
    [(None, False, "ok"), ("0", False, "ok"), ("1", True, "ok"), ("1", False, "warn"), ("2", True, "fail")],
)
def test_io_uring_may_be_forbidden(system: System, disabled: str | None, is_root: bool, level: str) -> None:
    if disabled is not None:
        write(
            system,
            {"proc/sys/kernel/io_uring_disabled": f"{disabled}\n", "proc/sys/kernel/io_uring_group": "27\n"},
        )
    found = the_one(io_uring_findings(system._replace(is_root=is_root)), level)
    assert ("27" in found.says) == (disabled == "1")
    assert ("sysctl" in found.way_out) == (disabled == "2")


def test_what_the_driver_lacks_is_named_with_what_it_is_for() -> None:
    assert levels(feature_findings(Offered(SEVEN_3))) == ["ok"] * len(NEEDS)
    old = {each.says.split()[0]: each for each in feature_findings(Offered(SIX_12)) if each.level != "ok"}
    assert {name: each.level for name, each in old.items()} == dict.fromkeys(
        (
            "USER_RECOVERY_FAIL_IO",
            "QUIESCE",
            "UPDATE_SIZE",
            "SAFE_STOP_DEV",
            "NO_AUTO_PART_SCAN",
            "SUPPORT_ZERO_COPY",
            "AUTO_BUF_REG",
            "SHMEM_ZC",
        ),
        "warn",
    )
    assert "client_buffers" in old["SHMEM_ZC"].says and "7.1" in old["SHMEM_ZC"].way_out
    lacking = feature_findings(Offered(SEVEN_3 & ~Feature.NEED_GET_DATA))
    the_one([each for each in lacking if each.level != "ok"], "fail", "NEED_GET_DATA")


@pytest.mark.parametrize(
    ("number", "level", "words"),
    [
        (2, "warn", "not loaded"),
        (6, "warn", "not loaded"),
        (13, "warn", "sudo"),
        (1, "warn", "sudo"),
        (0, "fail", "hung"),
    ],
)
def test_a_driver_that_does_not_answer_is_not_said_to_lack_features(
    number: int, level: str, words: str
) -> None:
    the_one(feature_findings(Offered(None, "it has hung", number)), level, words)


LIMITS = """Limit                     Soft Limit           Hard Limit           Units
Max open files            1024                 {files}                files
Max locked memory         65536                {memory}                 bytes
"""


def limits(system: System, files: str, memory: str, capabilities: int = 0) -> dict[str, Finding]:
    write(
        system,
        {
            "proc/7/limits": LIMITS.format(files=files, memory=memory),
            "proc/7/status": f"Name:\tx\nCapEff:\t{capabilities:016x}\n",
            "sys/kernel/mm/transparent_hugepage/shmem_enabled": "always within_size advise [never] deny force\n",
        },
    )
    memlock, nofile, huge = limit_findings(system, release("6.12.1"), Limited(7, "the daemon"))
    return {"memlock": memlock, "nofile": nofile, "huge": huge}


def test_the_limits_of_the_process_are_judged(system: System) -> None:
    assert levels([*limits(system, "65536", "unlimited").values()]) == ["ok"] * 3
    low = limits(system, "1024", "8388608")
    the_one([low["memlock"]], "warn", "the daemon", "8192 KiB", "LimitMEMLOCK=")
    the_one([low["nofile"]], "warn", "1024", "LimitNOFILE=")
    the_one([limits(system, "4096", "65536", 1 << 14)["memlock"]], "ok", "CAP_IPC_LOCK")
    for other in (13, 15):
        the_one([limits(system, "4096", "65536", 1 << other)["memlock"]], "warn")
    the_one([limits(system, "4096", "0")["nofile"]], "ok", "4096 files")
    the_one([limits(system, "4096", f"{64 << 20}")["memlock"]], "ok")
    unknown, _ = limit_findings(system, None, Limited(8, "the daemon"))
    the_one([unknown], "warn", "cannot be read")


def test_huge_pages_may_be_denied(system: System) -> None:
    setting = "sys/kernel/mm/transparent_hugepage/shmem_enabled"
    the_one(limit_findings(system, None, Limited(7, "x"))[1:], "warn", "no transparent huge pages")
    write(system, {setting: "always within_size advise never [deny] force\n"})
    the_one(limit_findings(system, None, Limited(7, "x"))[1:], "warn", "denied")


@pytest.mark.parametrize(
    ("kernel", "count", "level"),
    [
        ("6.12.1", 11, "ok"),
        ("6.12.1", 12, "warn"),
        ("6.14.9", 16, "fail"),
        ("6.15.0", 16, "ok"),
    ],
)
def test_the_driver_s_limit_of_devices_counts_before_6_15(
    system: System, kernel: str, count: int, level: str
) -> None:
    write(system, {"sys/module/ublk_drv/parameters/ublks_max": "16\n"})
    write(system, {f"sys/class/ublk-char/ublkc{n}": "" for n in range(count)})
    the_one(limit_findings(system, release(kernel), Limited(7, "x"))[2:], level, "ublks_max", str(count))


NOWATCH = 'SUBSYSTEM=="block", KERNEL=="ublkb*", OPTIONS+="nowatch"\n'
NAMES = 'KERNEL=="ublkb*", ENV{DISKSEQ}=="?*", \\\n  IMPORT{file}="/run/ublkpool-names/$env{DISKSEQ}"\n'
RULE = NOWATCH + NAMES


def test_the_rules_are_in_force_in_the_first_of_udev_s_directories(system: System) -> None:
    the_one(udev_findings(system), "ok", "no udev")
    write(system, {"run/udev/control": ""})
    the_one(udev_findings(system), "warn", "install -m 644")
    write(system, {"usr/lib/udev/rules.d/99-ublkpool.rules": RULE})
    the_one(udev_findings(system), "ok", "/usr/lib/udev/rules.d/99-ublkpool.rules")
    write(system, {"etc/udev/rules.d/99-ublkpool.rules": f"# {RULE}"})
    the_one(udev_findings(system), "warn")
    (system.root / "etc/udev/rules.d/99-ublkpool.rules").unlink()
    (system.root / "etc/udev/rules.d/99-ublkpool.rules").symlink_to("/dev/null")
    the_one(udev_findings(system), "warn")
    os.mkfifo(system.root / "etc/udev/rules.d/50-pipe.rules")
    write(system, {"etc/udev/rules.d/60-mine.rules": RULE})
    the_one(udev_findings(system), "ok", "60-mine.rules")
    write(system, {"etc/udev/rules.d/60-mine.rules": NOWATCH})
    the_one(udev_findings(system), "warn", "/dev/ublkpool/NAME", "install -m 644")
    write(system, {"etc/udev/rules.d/61-mine.rules": NAMES})
    the_one(udev_findings(system), "ok", "60-mine.rules")
    write(system, {"etc/udev/rules.d/60-mine.rules.off": RULE, "etc/udev/rules.d/60-mine.rules": ""})
    the_one(udev_findings(system), "warn")


def test_the_shipped_rules_are_recognised(system: System) -> None:
    shipped = Path(__file__).parents[2] / "config" / "99-ublkpool.rules"
    write(system, {"run/udev/control": "", "etc/udev/rules.d/99-ublkpool.rules": shipped.read_text()})
    the_one(udev_findings(system), "ok")


def test_a_disk_that_udev_has_not_linked_is_named(system: System) -> None:
    write(system, {"run/udev/control": "", "etc/udev/rules.d/99-ublkpool.rules": RULE})
    write(system, {"sys/class/block/ublkb0/diskseq": "12\n", "sys/class/block/ublkb1/diskseq": "13\n"})
    write(system, {f"run/ublkpool-names/1{n}": f"UBLKPOOL_NAME=vol{n}\n" for n in range(4)})
    (system.root / "dev/ublkpool").mkdir(parents=True)
    (system.root / "dev/ublkpool/vol2").symlink_to("../ublkb0")
    found = the_one(udev_findings(system), "warn", "/dev/ublkpool/vol3 to ublkb1", "trigger /dev/ublkb1")
    # Disks 10 and 11 are gone.
    assert not {"vol0", "vol1", "vol2"} & set(found.says.replace("/", " ").split())
    (system.root / "dev/ublkpool/vol3").symlink_to("../ublkb1")
    the_one(udev_findings(system), "ok", "has their names")


def test_without_root_doctor_says_that_it_does_not_know_the_names_which_udev_was_told(system: System) -> None:
    write(system, {"run/udev/control": "", "etc/udev/rules.d/99-ublkpool.rules": RULE})
    the_one(udev_findings(system._replace(is_root=False)), "ok", "only root may look")


@pytest.mark.parametrize("link", [("7", "b259:3"), ("b259:3", "7")])
def test_a_disk_that_udev_watches_is_named_whatever_the_rules_say(
    system: System, link: tuple[str, str]
) -> None:
    write(system, {"run/udev/control": "", "etc/udev/rules.d/99-ublkpool.rules": RULE})
    write(system, {"sys/class/block/ublkb0/dev": "259:2\n", "sys/class/block/ublkb1/dev": "259:3\n"})
    (system.root / "run/udev/watch").mkdir()
    the_one(udev_findings(system), "ok")
    (system.root / "run/udev/watch" / link[0]).symlink_to(link[1])
    found = the_one(udev_findings(system), "warn", "/dev/ublkb1", "udevadm")
    assert "ublkb0" not in found.says


def test_a_run_directory_is_judged_as_serve_does(system: System) -> None:
    the_one(run_directory_findings(system), "ok", "is not there")
    system.run_dir.mkdir(0o700)
    the_one(run_directory_findings(system), "ok", "is usable")
    (system.run_dir / "notes.txt").touch()
    the_one(run_directory_findings(system), "fail", "notes.txt")
    (system.run_dir / "notes.txt").unlink()
    system.run_dir.chmod(0o777)
    the_one(run_directory_findings(system), "fail", "other users may write", "--run-dir")
    system.run_dir.rmdir()
    system.run_dir.touch()
    the_one(run_directory_findings(system), "fail", "not a directory")
    the_one(run_directory_findings(system._replace(run_dir=Path("/tmp"))), "fail")


def test_a_directory_below_one_that_others_may_write_to_is_a_failure(system: System) -> None:
    (system.run_dir / "ours").mkdir(parents=True)
    system.run_dir.chmod(0o777)
    below = system._replace(run_dir=system.run_dir / "ours", state_dirs=(system.run_dir / "ours",))
    the_one(run_directory_findings(below), "fail", "could put another in its place")
    the_one(state_directory_findings(below), "fail", "--state-dir")


def test_a_directory_without_room_is_named(system: System) -> None:
    system.run_dir.mkdir(0o700)
    the_one(run_directory_findings(system, room(1 << 19)), "warn", "512 KiB", "df")
    the_one(run_directory_findings(system, room(1 << 20)), "ok")
    the_one(run_directory_findings(system, room(1 << 30, os.ST_RDONLY)), "fail", "read-only")


def test_a_directory_that_may_not_be_looked_at_is_no_failure(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("ublkpool.daemon.doctor.directories.why_refused", refuse)
    the_one(run_directory_findings(system), "warn", "was not looked at", "sudo")


def test_why_refused_makes_nothing(tmp_path: Path) -> None:
    assert own_directory.why_refused(tmp_path / "none" / "at" / "all") == ""
    assert list(tmp_path.iterdir()) == []


def test_a_state_that_keeps_its_device_unserved_is_named(system: System) -> None:
    (state,) = system.state_dirs
    state.mkdir(0o700)
    (state / "vol0.json").write_text('{"name": "vol0", "v": 1}')
    (state / ".vol9.json").write_text("unfinished")
    the_one(state_directory_findings(system), "ok")
    (state / "vol1.json").write_text('{"name": "vol0", "v": 1}')
    (state / "vol2.json").write_text('{"name": "vol2", "v": 2}')
    (state / "vol3.json").write_text("{")
    the_one(state_directory_findings(system)[1:], "fail", "vol1.json, vol2.json, vol3.json", "rebind")


def test_the_first_state_directory_that_is_there_is_the_one(system: System, tmp_path: Path) -> None:
    (tmp_path / "second").mkdir(0o700)
    both = system._replace(state_dirs=(tmp_path / "first", tmp_path / "second"))
    the_one(state_directory_findings(both), "ok", "second")


def test_a_state_directory_on_a_ublk_disk_is_a_failure(system: System) -> None:
    (state,) = system.state_dirs
    state.mkdir(0o700)
    device = state.stat().st_dev
    link = system.root / f"sys/dev/block/{os.major(device)}:{os.minor(device)}"
    disk = system.root / "sys/devices/virtual/block/ublkb3"
    for each in (disk, system.root / "sys/devices/virtual/block/dm-0/slaves", link.parent):
        each.mkdir(parents=True)
    link.symlink_to(disk)
    the_one(state_directory_findings(system)[1:], "fail", "/dev/ublkb3")
    link.unlink()
    link.symlink_to(disk.parent / "dm-0")
    the_one(state_directory_findings(system), "ok")
    (disk.parent / "dm-0/slaves/ublkb3").symlink_to(disk)
    the_one(state_directory_findings(system)[1:], "fail", "/dev/ublkb3")


def test_dev_shm_has_room(system: System) -> None:
    the_one(shm_findings(system, (), False), "fail", "is not there")
    (system.root / "dev/shm").mkdir(parents=True)
    the_one(shm_findings(system, (), False, room(GIB)), "ok", "1024 MiB")
    the_one(shm_findings(system, (), False, room((4 << 20) - 1)), "warn", "remount")
    the_one(shm_findings(system, (), False, room((64 << 10) - 1)), "fail", "is full")


def test_pools_of_a_dead_daemon_are_told_from_those_in_use(system: System) -> None:
    shm = system.root / "dev/shm"
    shm.mkdir(parents=True)
    ours = instance_of(system.run_dir)
    for number, instance in ((0, ours), (1, ours), (5, "0badcafe")):
        (shm / f"{arena_prefix(instance, number)[1:]}-ctl").touch()
    (shm / "sem.other").touch()
    found = shm_findings(system, {0}, False, room(GIB))
    assert levels(found) == ["ok", "ok", "warn"] and "1 other run directories" in found[1].says
    the_one(found[2:], "warn", f"ublkpool-{ours}-1-ctl", f"--run-dir {system.run_dir}")
    assert f"{ours}-0-ctl" not in found[2].says and "0badcafe" not in found[2].says
    assert levels(shm_findings(system, {0}, True, room(GIB))) == ["ok", "ok"], "the daemon has them"
    assert levels(shm_findings(system, None, False, room(GIB))) == ["ok", "ok"], "it is not known"


def test_many_names_and_strange_ones_stay_in_one_line() -> None:
    assert some(f"v{n}" for n in range(10)) == "v0, v1, v2, v3, v4, v5, v6, v7, v8, v9"
    assert some(f"v{n}" for n in range(12)).endswith("v9 and 2 more")
    assert printable("a\nb\udcff\x1bé") == "a?b??é"


def test_the_worst_finding_is_the_report_s_level() -> None:
    fine, bad = Finding("a", "ok", "x"), Finding("a", "fail", "x")
    assert report_of([]).level == "ok"
    assert report_of([fine, Finding("a", "warn", "x"), fine]).level == "warn"
    assert report_of([bad, Finding("a", "warn", "x"), fine]).level == "fail"
