"""The command line itself: wrong usage, help, commands that run in this process, and that it starts fast."""

import json
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from support.cli_commands import cli_commands
from support.cli_runs import complaint, run
from support.fakes.daemon import FakeDaemon, running_daemon
from ublkpool.bufpool.errors import BackendError
from ublkpool.daemon.cli.commands import cli
from ublkpool.daemon.settings.config import DeviceConfig, ServeConfig

COMMANDS = cli_commands()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    with running_daemon(tmp_path) as running:
        yield running


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

    install(monkeypatch, "ublkpool.daemon.lifetime", serve=serve)
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


def test_serve_reads_the_config_and_the_run_dir_option_wins(
    served: list[ServeConfig], tmp_path: Path
) -> None:
    file = tmp_path / "x.toml"
    file.write_text('[daemon]\nrun_dir = "/run/a"\n[[device]]\nname = "vol0"\n')
    for more in ([], ["--run-dir", "/run/b"]):
        run("serve", "-c", str(file), *more)
    assert [str(config.run_dir) for config in served] == ["/run/a", "/run/b"]
    assert served[0].devices == (DeviceConfig(name="vol0"),)


def test_the_option_says_how_many_devices_are_prepared_and_the_config_of_which_shape(
    served: list[ServeConfig], tmp_path: Path
) -> None:
    file = tmp_path / "x.toml"
    file.write_text("[prepare]\ncount = 3\ndepth = 64\n")
    for more in ([], ["--prepare", "5"], ["--prepare", "0"]):
        run("serve", "-c", str(file), *more)
    run("serve", "--prepare", "2")
    found = [config.prepare for config in served]
    assert found[2] is None
    assert [(each.number, each.shape.depth, each.shape.isolation) for each in found if each is not None] == [
        (3, 64, "none"),
        (5, 64, "none"),
        (2, 128, "none"),
    ]
    assert run("serve", "--prepare", "-1").exit_code == 2


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
    # Volumes are managed without a daemon.
    assert ("--run-dir" in text) == (command.name != "volume")


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
            "volume",
            "metrics",
            "shutdown",
            "client",
            "features",
        ),
        "doctor",
        "node-owner",
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
