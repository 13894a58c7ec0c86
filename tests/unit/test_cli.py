"""The command line: its output on stdout and stderr, its exit status, and that it starts fast."""

import json
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from support.cli_commands import cli_commands
from support.fakes.daemon import FakeDaemon, running_daemon
from ublkpool.bufpool.errors import BackendError
from ublkpool.daemon.cli.commands import cli
from ublkpool.daemon.settings.config import BackendConfig, DeviceConfig, ServeConfig

COMMANDS = cli_commands()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    with running_daemon(tmp_path) as running:
        yield running


def run(*args: str, run_dir: Path | None = None) -> Result:
    env = {"UBLKPOOL_RUN_DIR": str(run_dir) if run_dir else None, "UBLKPOOL_DEBUG": None}
    return CliRunner(env=env).invoke(cli, args, prog_name="ublkpool")


def complaint(result: Result, status: int) -> str:
    """The one line on stderr of a command that failed with this status."""
    assert (result.exit_code, result.stdout) == (status, "")
    assert result.stderr.startswith("ublkpool: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("ublkpool: ").rstrip("\n")


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


@pytest.mark.parametrize(
    ("args", "error"),
    [
        ("add", "Missing argument 'NAME'."),
        ("add a --queues 9999", "--queues: expected int <= 4096, got 9999"),
        ("add a --queues four", "Invalid value for '--queues': 'four' is not a valid integer."),
        ("add a --size 1X", "--size: '1X' is not a size"),
        ("add a --max-io 5000", "--max-io: expected int that's a multiple of 4096, got 5000"),
        (
            "add a --placement bakend",
            '--placement: expected pool or backend, got "bakend", did you mean backend?',
        ),
        (
            "add a --no-need-get-data --placement backend",
            "--placement: backend placement needs need_get_data",
        ),
        (
            "add a --size 1M --answers worker --backend null",
            "--answers: the workers answer requests, so a backend would get none",
        ),
        (
            "add a --size 1M --answers worker --client-buffers 1M",
            "--answers: the workers answer requests, so no backend can share client buffers",
        ),
        ("add ../a", "NAME: expected 1 to 64 letters"),
        ("add a path=x", "path=x is an option for a backend; name one with --backend"),
        ("add a --layer readonly", "--layer readonly is for a backend; name one with --backend"),
        ("add a --backend file path", "expected KEY=VALUE, got 'path'"),
        ("add a --backend file =x", "expected KEY=VALUE, got '=x'"),
        ("add a --backend file x=1 x=2", "x= is given twice"),
        ("add a --backend file kind=x", "kind= is no option"),
        ("add a --backend none.py", "--backend: no such file: /"),
        ("add a --nope", "No such option"),
        ("del", "name the devices to delete, or say --all"),
        ("del a --all", "name the devices to delete, or say --all, not both"),
        ("backend memory", "Missing option '--device'."),
        ("serve extra", "Got unexpected extra argument"),
        ("serve -c none.toml", "none.toml: No such file or directory"),
        ("nope", "No such command 'nope'."),
        ("", "Missing command."),
    ],
)
def test_wrong_usage_is_status_2_and_one_line(tmp_path: Path, args: str, error: str) -> None:
    assert complaint(run(*args.split(), run_dir=tmp_path), 2).startswith(error)


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


def install(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> None:
    """Put a module with these functions in the place of a real one."""
    module = types.ModuleType(name)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ServeConfig]:
    configs: list[ServeConfig] = []

    def serve(config: ServeConfig) -> int:
        configs.append(config)
        return 3

    install(monkeypatch, "ublkpool.daemon.supervisor", serve=serve)
    install(monkeypatch, "ublkpool.daemon.logs", configure=lambda level, log_format: None)
    return configs


def test_serve_without_a_config_has_no_devices(served: list[ServeConfig], tmp_path: Path) -> None:
    assert run("serve", "--run-dir", str(tmp_path)).exit_code == 3
    assert run("serve").exit_code == 3
    assert served == [ServeConfig(run_dir=tmp_path), ServeConfig(run_dir=Path("/run/ublkpool"))]


def test_the_option_overrides_the_environment_and_that_the_config_for_the_state_directory(
    served: list[ServeConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.toml"
    file.write_text('[daemon]\nstate_dir = "/var/a"\n')
    run("serve", "-c", str(file))
    monkeypatch.setenv("UBLKPOOL_STATE_DIR", "/var/b")
    run("serve", "-c", str(file))
    run("serve", "-c", str(file), "--state-dir", "/var/c")
    assert [str(config.state_dir) for config in served] == ["/var/a", "/var/b", "/var/c"]


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


def test_serve_reads_the_config_and_the_run_dir_option_wins(
    served: list[ServeConfig], tmp_path: Path
) -> None:
    file = tmp_path / "x.toml"
    file.write_text('[daemon]\nrun_dir = "/run/a"\n[[device]]\nname = "vol0"\n')
    for more in ([], ["--run-dir", "/run/b"]):
        run("serve", "-c", str(file), *more)
    assert [str(config.run_dir) for config in served] == ["/run/a", "/run/b"]
    assert served[0].devices == (DeviceConfig(name="vol0"),)


def test_serve_reports_every_mistake_of_a_config(served: list[ServeConfig], tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text('[[device]]\nname = "a"\nqueues = 9999\ndepth = 0\n')
    result = run("serve", "-c", str(file))
    assert (result.exit_code, served) == (2, [])
    assert result.stderr.splitlines() == [
        f'ublkpool: {file}: device "a": queues: expected int <= 4096, got 9999',
        f'ublkpool: {file}: device "a": depth: expected int >= 1, got 0',
    ]


def test_backend_runs_in_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[Any, ...]] = []

    def run_backend(*args: Any, transport: str) -> int:
        calls.append((*args, transport))
        return 4

    install(monkeypatch, "ublkpool.bufpool.sdk.loader", run_backend=run_backend)
    result = run(*["backend", "file", "--device", "vol0", "path=x"], run_dir=tmp_path)
    assert result.exit_code == 4
    run(*["backend", "file", "--device", "vol0", "--transport", "ring"], run_dir=tmp_path)
    assert calls == [
        ("file", {"path": "x"}, "vol0", tmp_path, "auto"),
        ("file", {}, "vol0", tmp_path, "ring"),
    ]


def test_a_backend_that_cannot_be_used_is_status_2(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_backend(*args: Any, transport: str) -> int:
        raise BackendError("file: path= is missing")

    install(monkeypatch, "ublkpool.bufpool.sdk.loader", run_backend=run_backend)
    assert complaint(run("backend", "file", "--device", "a"), 2) == "file: path= is missing"


def test_features_are_names(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "ublkpool.ublk.control", get_features=lambda: 6)
    install(monkeypatch, "ublkpool.ublk.abi", feature_names=lambda bits: ["A", "B"] if bits == 6 else [])
    assert run("features").stdout == "A\nB\n"
    assert json.loads(run("features", "--json").stdout) == {"bits": 6, "flags": ["A", "B"]}


def test_a_failure_of_the_system_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_features() -> int:
        raise PermissionError(13, "Permission denied", "/dev/ublk-control")

    install(monkeypatch, "ublkpool.ublk.control", get_features=get_features)
    install(monkeypatch, "ublkpool.ublk.abi", feature_names=lambda bits: [])
    assert complaint(run("features"), 1) == "/dev/ublk-control: Permission denied"


def test_a_bug_shows_its_traceback_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_features() -> int:
        raise KeyError("oops")

    install(monkeypatch, "ublkpool.ublk.control", get_features=get_features)
    install(monkeypatch, "ublkpool.ublk.abi", feature_names=lambda bits: [])
    assert complaint(run("features"), 1).startswith("internal error: KeyError: 'oops'")
    shown = CliRunner(env={"UBLKPOOL_DEBUG": "1"}).invoke(cli, ["features"])
    assert "Traceback" in shown.stderr


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_help_of_a_command_names_each_option_and_shows_an_example(command: click.Command) -> None:
    text = run(command.name or "", "--help").stdout
    for parameter in command.params:
        for name in (*parameter.opts, *parameter.secondary_opts):
            assert name in text or isinstance(parameter, click.Argument)
        assert not isinstance(parameter, click.Option) or parameter.help
    assert f"\n  ublkpool {command.name} " in text
    assert "--run-dir" in text


def test_help_and_version() -> None:
    text = run("--help").stdout
    assert all(f"\n  {name} " in text for name in COMMANDS)
    assert run("--version").stdout == "ublkpool 0.1.0\n"


def test_the_commands_are_the_contract() -> None:
    assert list(COMMANDS) == [
        *(
            "serve",
            "add",
            "del",
            "rebind",
            "set",
            "drain",
            "resume",
            "reload",
            "resize",
            "list",
            "stats",
            "top",
            "events",
            "backend",
            "metrics",
            "shutdown",
            "client",
            "features",
        ),
        "doctor",
    ]


PROBE = """
import sys
from ublkpool.daemon.cli.commands import cli
try:
    cli.main(sys.argv[1:], prog_name="ublkpool")
except SystemExit as exit:
    assert not exit.code, exit.code
slow = {"zmq", "rich", "pydantic", "asyncio", "logging", "tomllib", "ssl", "ublkpool.ublk", "daemon"}
print("slow:", sorted(slow & set(sys.modules)))
"""


@pytest.mark.parametrize("args", ["list", "list --json", "stats", "add x --size 1M", "del --all"])
def test_client_commands_import_nothing_slow(daemon: FakeDaemon, tmp_path: Path, args: str) -> None:
    command = [sys.executable, "-c", PROBE, *args.split(), "--run-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1:] == ["slow: []"], done.stderr


def test_python_dash_m_is_the_command() -> None:
    command = [sys.executable, "-m", "ublkpool.daemon", "--version"]
    assert subprocess.run(command, capture_output=True, timeout=60).stdout == b"ublkpool 0.1.0\n"


def test_the_bare_name_is_not_imported() -> None:
    assert "daemon" not in sys.modules


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
