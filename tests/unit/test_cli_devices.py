"""Commands that ask the daemon: what they send, their output on stdout and stderr, and their exit status."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.cli_runs import complaint, run
from support.fakes.daemon import FakeDaemon, running_daemon
from ublkpool.daemon.settings.config import BackendConfig, DeviceConfig


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    with running_daemon(tmp_path) as running:
        yield running


def test_add_prints_the_path_and_sends_what_was_asked(daemon: FakeDaemon, tmp_path: Path) -> None:
    result = run(
        *[
            "add",
            "vol0",
            "--size",
            "1G",
            "--queues",
            "2",
            "--depth",
            "64",
            "--id",
            "7",
            "--max-io",
            "1M",
            "--need-get-data",
            "--placement",
            "backend",
        ],
        *["--recovery", "fail", "--read-only", "--pool", "64M", "--io-timeout", "5", "--on-timeout", "fail"],
        *["--on-absent", "fail", "--absent-timeout", "7", "--no-partitions", "--no-rings"],
        *["--huge-pages", "off", "--affinity", "1,3"],
        *["--client-buffers", "16M"],
        *["--backend", "memory", "a=1", "b=x=y"],
        run_dir=tmp_path,
    )
    assert (result.exit_code, result.stdout, result.stderr) == (0, "/dev/ublkb0\n", "")
    assert daemon.service.configs["vol0"] == DeviceConfig(
        name="vol0",
        size_bytes=1 << 30,
        queues=2,
        depth=64,
        id=7,
        max_io_bytes=1 << 20,
        placement="backend",
        recovery="fail",
        read_only=True,
        pool_bytes=64 << 20,
        huge_pages="off",
        affinity="1,3",
        io_timeout_s=5.0,
        on_timeout="fail",
        on_absent="fail",
        partitions=False,
        rings=False,
        absent_timeout_s=7.0,
        client_buffers_bytes=16 << 20,
        backend=BackendConfig(kind="memory", options={"a": "1", "b": "x=y"}, cwd=str(Path.cwd())),
    )


def test_add_accepts_answers_worker(daemon: FakeDaemon, tmp_path: Path) -> None:
    run(*["add", "floor", "--size", "1M", "--answers", "worker"], run_dir=tmp_path)
    assert daemon.service.configs["floor"] == DeviceConfig(name="floor", size_bytes=1 << 20, answers="worker")


def test_add_without_options_is_a_device_of_defaults(daemon: FakeDaemon, tmp_path: Path) -> None:
    result = run("add", "vol0", run_dir=tmp_path)
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == (
        "ublkpool: vol0 waits for a backend; attach one with: "
        "ublkpool backend KIND|FILE.py --device vol0 [KEY=VALUE ...]\n"
    )
    assert daemon.service.configs["vol0"] == DeviceConfig(name="vol0")


def test_add_can_turn_need_get_data_off(daemon: FakeDaemon, tmp_path: Path) -> None:
    run("add", "vol0", "--no-need-get-data", run_dir=tmp_path)
    assert not daemon.service.configs["vol0"].need_get_data


def test_a_backend_file_is_made_absolute(
    daemon: FakeDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").touch()
    assert run("add", "vol0", "--backend", "./mine.py", "path=x", run_dir=tmp_path).exit_code == 0
    expected = BackendConfig(kind=str(tmp_path / "mine.py"), options={"path": "x"}, cwd=str(tmp_path))
    assert daemon.service.configs["vol0"].backend == expected


@pytest.mark.parametrize(
    "args", [["--wait", "0.05", "vol0"], ["vol0", "--wait", "0.05"], ["vol0", "--wait=0.05"]]
)
def test_add_waits_no_longer_than_the_given_time(daemon: FakeDaemon, tmp_path: Path, args: list[str]) -> None:
    result = run("add", *args, run_dir=tmp_path)
    assert complaint(result, 1) == "vol0: no backend attached within 0.05 s"


@pytest.mark.parametrize(
    "args", [["--wait", "vol0"], ["vol0", "--wait"], ["vol0", "--wait", "--queues", "1"]]
)
def test_add_waits_until_a_backend_attaches(
    daemon: FakeDaemon, tmp_path: Path, args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float | None] = []

    async def wait_live(name: str, timeout_s: float | None) -> Any:
        waited.append(timeout_s)
        daemon.service.states[name] = "live"
        return daemon.service.list()[0]

    monkeypatch.setattr(daemon.service, "wait_live", wait_live)
    result = run("add", *args, run_dir=tmp_path)
    assert (result.exit_code, result.stdout, waited) == (0, "/dev/ublkb0\n", [None])


def test_what_the_daemon_refuses_has_its_status(daemon: FakeDaemon, tmp_path: Path) -> None:
    bad = run("add", "a", "--backend", "memory", "bad=1", run_dir=tmp_path)
    assert complaint(bad, 2) == "memory: unknown option bad"
    missing = run("del", "a", run_dir=tmp_path)
    assert complaint(missing, 1) == "a: no such device"


@pytest.mark.parametrize("args", ["list", "list --json", "stats", "add a", "del a", "del --all"])
def test_no_daemon_is_status_1_and_one_line(tmp_path: Path, args: str) -> None:
    assert complaint(run(*args.split(), run_dir=tmp_path), 1).startswith(
        f"{tmp_path}/admin.sock: no such socket"
    )


def test_the_run_dir_option_wins_over_the_environment(daemon: FakeDaemon, tmp_path: Path) -> None:
    result = run("list", "--json", "--run-dir", str(tmp_path), run_dir=tmp_path / "other")
    assert (result.exit_code, json.loads(result.stdout)) == (0, [])


def test_list_json_is_the_contract(daemon: FakeDaemon, tmp_path: Path) -> None:
    run(*["add", "vol0", "--size", "1G", "--backend", "memory"], run_dir=tmp_path)
    run(*["add", "vol1"], run_dir=tmp_path)
    first, second = json.loads(run("list", "--json", run_dir=tmp_path).stdout)
    assert first == {
        "name": "vol0",
        "id": 0,
        "path": "/dev/ublkb0",
        "state": "live",
        "size_bytes": 1 << 30,
        "queues": 1,
        "depth": 128,
        "need_get_data": True,
        "placement": "pool",
        "answers": "backend",
        "isolation": "process",
        "zero_copy": False,
        "config_size_bytes": None,
        "memory_bytes": 0,
        "recovery": "reissue",
        "flags": ["URING_CMD_COMP_IN_TASK"],
        "workers": [{"queue": 0, "pid": 100, "cpu": 0}],
        "backend": {"kind": "memory", "pid": 99, "attached": True},
        "reason": "",
        "epoch": 1,
        "drain": "",
        "differs": [],
        "iops_max": 0,
        "bytes_per_s_max": 0,
        "burst_s": 0.0,
    }
    assert (second["state"], second["backend"]) == ("waiting", {"kind": None, "pid": None, "attached": False})


def test_list_is_an_aligned_table(daemon: FakeDaemon, tmp_path: Path) -> None:
    run(*["add", "a", "--size", "1G", "--backend", "memory"], run_dir=tmp_path)
    run(*["add", "longer-name", "--no-need-get-data"], run_dir=tmp_path)
    header, first, second = run("list", run_dir=tmp_path).stdout.splitlines()
    assert first.split() == [
        "a",
        "/dev/ublkb0",
        "live",
        "1G",
        "1",
        "128",
        "pool",
        "reissue",
        "memory",
        "(pid",
        "99)",
    ]
    assert second.split() == [
        "longer-name",
        "/dev/ublkb1",
        "waiting",
        "-",
        "1",
        "128",
        "at",
        "fetch",
        "reissue",
        "none",
    ]
    assert header.index("PATH") == first.index("/dev") == second.index("/dev")


def test_stats_json_and_table(daemon: FakeDaemon, tmp_path: Path) -> None:
    for name in ("a", "b"):
        run("add", name, run_dir=tmp_path)
    [device] = json.loads(run("stats", "b", "--json", run_dir=tmp_path).stdout)
    assert device["name"] == "b"
    assert device["queues"][0]["requests"] == {
        "read": 3,
        "write": 2,
        "flush": 0,
        "discard": 0,
        "write_zeroes": 0,
    }
    assert device["queues"][0]["copies"] == {"kernel_bytes": 20480, "own_bytes": 0, "in_place_bytes": 0}
    assert device["queues"][0]["counters"] == {"replayed": 1}
    table = run("stats", run_dir=tmp_path).stdout
    assert "3 (12K)" in table
    assert [line.split()[0] for line in table.splitlines()] == ["NAME", "a", "b", "NAME", "a", "b"]
    assert complaint(run("stats", "c", run_dir=tmp_path), 1) == "c: no such device"


def test_del_prints_what_it_deleted(daemon: FakeDaemon, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        run("add", name, run_dir=tmp_path)
    assert run("del", "b", run_dir=tmp_path).stdout == "b\n"
    assert daemon.service.forced == {False}
    assert run("del", "--all", "--force", run_dir=tmp_path).stdout == "a\nc\n"
    assert daemon.service.forced == {False, True}
    assert daemon.service.forgot == [True, True]
    run("add", "a", run_dir=tmp_path)
    assert run("del", "--all", "--keep-stores", run_dir=tmp_path).stdout == "a\n"
    assert daemon.service.forgot == [True, True, False]


def test_rebind_asks_the_daemon_and_prints_nothing(daemon: FakeDaemon, tmp_path: Path) -> None:
    run("add", "vol0", run_dir=tmp_path)
    result = run("rebind", "vol0", run_dir=tmp_path)
    assert (result.exit_code, result.output) == (0, "")
    assert daemon.service.rebound == ["vol0"]
    assert complaint(run("rebind", "other", run_dir=tmp_path), 1) == "other: no such device"


def test_set_sends_numbers_bools_and_texts_and_prints_nothing(daemon: FakeDaemon, tmp_path: Path) -> None:
    run("add", "vol0", "--backend", "memory", "size=1M", run_dir=tmp_path)
    result = run("set", "vol0", "io_timeout=2.5", "absent_timeout=7", "on_absent=fail", run_dir=tmp_path)
    assert (result.exit_code, result.output) == (0, "")
    config = daemon.service.configs["vol0"]
    assert (config.io_timeout_s, config.absent_timeout_s, config.on_absent) == (2.5, 7.0, "fail")
    result = run("set", "vol0", "backend.size=2M", run_dir=tmp_path)
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == "ublkpool: the backend of vol0 gets its new options at its next start\n"
    assert daemon.service.configs["vol0"].backend.options == {"size": "2M"}  # type: ignore[union-attr]


def test_set_without_values_shows_every_setting(daemon: FakeDaemon, tmp_path: Path) -> None:
    run("add", "vol0", run_dir=tmp_path)
    rows = [line.split(maxsplit=2) for line in run("set", "vol0", run_dir=tmp_path).stdout.splitlines()]
    assert rows[0] == ["KEY", "VALUE", "CONFIG  A CHANGE APPLIES"]
    assert ["io_timeout", "30", "now"] in rows and ["queues", "1", "to a new device"] in rows
    as_json = json.loads(run("set", "vol0", "--json", run_dir=tmp_path).stdout)
    assert {"key": "on_absent", "value": "wait", "configured": "wait", "applies": "now"} in as_json


@pytest.mark.parametrize(
    ("values", "error"),
    [
        (["io_timeout=inf"], 'io_timeout: expected float, got "inf"'),
        (["io_timeout=nan"], 'io_timeout: expected float, got "nan"'),
        (["io_timeout=-1", "on_timeout=fail"], "io_timeout: expected float > 0.0, got -1"),
        (["io_timeout"], "expected KEY=VALUE, got 'io_timeout'"),
        (["=5"], "expected KEY=VALUE, got '=5'"),
        (["io_timeout=5", "io_timeout=6"], "io_timeout= is given twice"),
        (
            ["depth=4"],
            "depth: is fixed when the device is made: del the device, then add it with the new value",
        ),
        (["backend.x=1"], "backend.x: the daemon runs no backend for this device"),
    ],
)
def test_set_refuses_a_mistake_in_one_line_and_changes_nothing(
    daemon: FakeDaemon, tmp_path: Path, values: list[str], error: str
) -> None:
    run("add", "vol0", run_dir=tmp_path)
    before = daemon.service.configs["vol0"]
    assert error in complaint(run("set", "vol0", *values, run_dir=tmp_path), 2)
    assert daemon.service.configs["vol0"] is before


def test_drain_says_so_and_resume_says_nothing(daemon: FakeDaemon, tmp_path: Path) -> None:
    run("add", "vol0", run_dir=tmp_path)
    assert run("drain", "vol0", run_dir=tmp_path).stdout == "drained\n"
    assert run("drain", "vol0", "--no-flush", "--timeout", "2.5", run_dir=tmp_path).stdout == "drained\n"
    assert daemon.service.drains == [("vol0", True, None), ("vol0", False, 2.5)]
    result = run("resume", "vol0", run_dir=tmp_path)
    assert (result.exit_code, result.output, daemon.service.resumed) == (0, "", ["vol0"])
    assert complaint(run("drain", "other", run_dir=tmp_path), 1) == "other: no such device"
    assert complaint(run("resume", "other", run_dir=tmp_path), 1) == "other: no such device"
    assert "is not in the range x>0" in complaint(run("drain", "vol0", "--timeout", "0", run_dir=tmp_path), 2)


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ("20G", "vol0: grew from 10G to 20G (21474836480 bytes)"),
        ("+5G", "vol0: grew from 10G to 15G (16106127360 bytes)"),
        ("10240M", "vol0: has 10G (10737418240 bytes) already, nothing changes"),
        ("+0", "vol0: has 10G (10737418240 bytes) already, nothing changes"),
    ],
)
def test_resize_prints_the_change(daemon: FakeDaemon, tmp_path: Path, size: str, said: str) -> None:
    run("add", "vol0", "--size", "10G", run_dir=tmp_path)
    result = run("resize", "vol0", size, run_dir=tmp_path)
    assert (result.exit_code, result.output) == (0, f"{said}\n")


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ("-5G", "'-5G': a device never shrinks: write its new size, or +SIZE for that much more"),
        ("ten", "'ten' is not a size (write 4096, 64M or 1.5G)"),
        ("+", "'' is not a size"),
        ("++5G", "'+5G' is not a size"),
        ("0.3", "'0.3' is not a whole number of bytes"),
    ],
)
def test_resize_refuses_what_is_no_size(daemon: FakeDaemon, tmp_path: Path, size: str, reason: str) -> None:
    run("add", "vol0", "--size", "10G", run_dir=tmp_path)
    assert reason in complaint(run("resize", "vol0", size, run_dir=tmp_path), 2)
    assert complaint(run("resize", "other", "20G", run_dir=tmp_path), 1) == "other: no such device"


def test_an_add_in_a_directory_that_was_removed_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    refused = run("add", "vol0", "--backend", "file", "path=a.img", run_dir=tmp_path)
    assert complaint(refused, 2).startswith(
        "your current directory: No such file or directory: change to one"
    )
