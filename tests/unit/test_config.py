"""Each mistake in a config file is one line: the file, the key's path, the value and the way out."""

import grp
import os
import shutil
import sys
from pathlib import Path

import msgspec
import pytest

from ublkpool.daemon.errors import ConfigError
from ublkpool.daemon.settings.config import BackendConfig, DaemonTable, DeviceConfig, ServeConfig
from ublkpool.daemon.settings.config_file import load_config

ROOT = Path(__file__).parents[2]


def write(directory: Path, text: str) -> Path:
    file = directory / "x.toml"
    file.write_text(text)
    return file


def complaints(directory: Path, text: str) -> list[str]:
    """The error lines for this text, without the file's name."""
    file = write(directory, text)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert caught.value.status == 2
    assert all(line.startswith(f"{file}:") for line in caught.value.lines)
    return [line.removeprefix(f"{file}:").removeprefix(" ") for line in caught.value.lines]


def as_served(config: ServeConfig) -> ServeConfig:
    """The config without what only a reload needs."""
    return config._replace(file=None, table=DaemonTable())


def test_a_full_config_is_read(tmp_path: Path) -> None:
    group = grp.getgrgid(os.getgid()).gr_name
    file = write(
        tmp_path,
        f"""
        [daemon]
        run_dir = "/run/other"
        group = "{group}"
        log_level = "debug"
        log_format = "json"
        [[device]]
        name = "vol0"
        size = "1.5G"
        queues = 4
        depth = 64
        id = 7
        max_io = "1M"
        need_get_data = true
        placement = "backend"
        recovery = "fail"
        read_only = true
        partitions = false
        pool = 67108864
        huge_pages = "require"
        affinity = "0-3,8"
        io_timeout = 5
        on_timeout = "fail"
        absent_timeout = 2.5
        iops_max = 500
        bytes_per_s_max = "100M"
        burst = 2
        client_buffers = "16M"
        on_absent = "fail"
        [device.backend]
        kind = "file"
        path = "vol0.img"
        direct = true
        cache = 8
        """,
    )
    device = DeviceConfig(
        name="vol0",
        size_bytes=3 << 29,
        queues=4,
        depth=64,
        id=7,
        max_io_bytes=1 << 20,
        placement="backend",
        recovery="fail",
        read_only=True,
        partitions=False,
        pool_bytes=64 << 20,
        huge_pages="require",
        affinity="0-3,8",
        io_timeout_s=5.0,
        on_timeout="fail",
        absent_timeout_s=2.5,
        iops_max=500,
        bytes_per_s_max=100 << 20,
        burst_s=2.0,
        client_buffers_bytes=16 << 20,
        on_absent="fail",
        backend=BackendConfig(
            kind="file", options={"path": "vol0.img", "direct": "true", "cache": "8"}, cwd=str(tmp_path)
        ),
    )
    read = load_config(file)
    assert read.file == file and read.table.group == group
    assert as_served(read) == ServeConfig(Path("/run/other"), group, "debug", "json", (device,))
    assert load_config(file, Path("/run/mine")).run_dir == Path("/run/mine")


def test_an_empty_config_is_the_defaults(tmp_path: Path) -> None:
    assert as_served(load_config(write(tmp_path, ""))) == ServeConfig()


def test_the_sample_config_loads_and_shows_the_defaults() -> None:
    sample = ROOT / "config" / "ublkpool.toml"
    assert load_config(sample).devices == (DeviceConfig(name="vol0"),)


def test_the_sample_config_still_loads_with_every_example_uncommented(tmp_path: Path) -> None:
    lines = (ROOT / "config" / "ublkpool.toml").read_text().splitlines()
    shown = [line.removeprefix("# ") for line in lines if line.startswith(("# [", "[")) or " = " in line]
    text = "\n".join(line for line in shown if not line.startswith(("group", "user")))
    config = load_config(write(tmp_path, text))
    assert [device.name for device in config.devices] == ["vol0", "scratch"]
    assert config.devices[0].size_bytes == 10 << 30
    assert config.devices[1].backend == BackendConfig(kind="memory", cwd=str(tmp_path))


def test_a_list_gives_an_option_several_times(tmp_path: Path) -> None:
    text = (
        '[[device]]\nname = "a"\nbackend = { kind = "theirs", urls = ["x", "y"], ports = [1, 2], one = "z" }'
    )
    (device,) = load_config(write(tmp_path, text)).devices
    assert device.backend is not None
    assert device.backend.options == {"urls": ["x", "y"], "ports": ["1", "2"], "one": "z"}


def test_a_backend_s_interpreter_is_on_record_with_its_whole_path(tmp_path: Path) -> None:
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "python").symlink_to(sys.executable)
    text = '[[device]]\nname = "a"\nbackend = {{ kind = "null", python = "{}" }}'
    for given, found in (("env/python", str(tmp_path / "env" / "python")), ("sh", shutil.which("sh"))):
        (device,) = load_config(write(tmp_path, text.format(given))).devices
        assert device.backend == BackendConfig(kind="null", cwd=str(tmp_path), python=found)
        assert msgspec.json.decode(msgspec.json.encode(device), type=DeviceConfig) == device


def test_a_backend_s_layers_are_on_record_in_their_order(tmp_path: Path) -> None:
    text = '[[device]]\nname = "a"\nbackend = { kind = "null", layers = ["log:file=/x", "readonly"] }'
    (device,) = load_config(write(tmp_path, text)).devices
    assert device.backend is not None and device.backend.layers == ("log:file=/x", "readonly")
    assert msgspec.json.decode(msgspec.json.encode(device), type=DeviceConfig) == device


def test_a_backend_s_new_keys_are_not_sent_unless_they_are_used() -> None:
    """An earlier daemon refuses keys that it does not know."""
    sent = msgspec.json.encode(BackendConfig(kind="null"))
    assert b"python" not in sent and b"layers" not in sent


@pytest.mark.parametrize(
    ("key", "complaint"),
    [
        ("queues = 9999", "queues: expected int <= 4096, got 9999"),
        ("queues = 0", "queues: expected int >= 1, got 0"),
        ('queues = "four"', 'queues: expected int, got "four"'),
        ("depth = true", "depth: expected int, got true"),
        ("id = -1", "id: expected int >= 0, got -1"),
        ('affinity = "0-"', "affinity: expected auto, off or CPUs as in '0-3,8', got \"0-\""),
        ('affinity = "3-1"', "affinity: '3-1' names no CPU"),
        ('huge_pages = "on"', 'huge_pages: expected auto or off or require, got "on"'),
        ('id = "x"', 'id: expected int, got "x"'),
        ('size = "1X"', "size: '1X' is not a size (write 4096, 64M or 1.5G)"),
        ("size = 1000", "size: expected int that's a multiple of 512, got 1000"),
        ("size = 0", "size: expected int >= 512, got 0"),
        ("size = [1]", "size: expected int, got [1]"),
        ('max_io = "6000"', "max_io: expected int that's a multiple of 4096, got 6000"),
        ('max_io = "64M"', "max_io: expected int <= 33554432, got 67108864"),
        ("need_get_data = 1", "need_get_data: expected bool, got 1"),
        (
            'placement = "bakend"',
            'placement: expected pool or backend, got "bakend", did you mean backend?',
        ),
        ("recovery = 1", "recovery: expected reissue or abort or fail or none, got 1"),
        ("io_timeout = 0", "io_timeout: expected float > 0.0, got 0"),
        ("io_timeout = 0.0005", "io_timeout: expected at least 0.001 (a millisecond), got 0.0005"),
        ("absent_timeout = 1e-9", "absent_timeout: expected at least 0.001 (a millisecond), got 1e-09"),
        ("iops_max = -1", "iops_max: expected int >= 0, got -1"),
        ("iops_max = 1.5", "iops_max: expected int, got 1.5"),
        (
            'bytes_per_s_max = "4K"',
            "bytes_per_s_max: expected at least 65536 bytes a second, or 0 for no limit, got 4096",
        ),
        ('bytes_per_s_max = "2T"', "bytes_per_s_max: expected int <= 1099511627776, got 2199023255552"),
        ("burst = 0.001", "burst: expected float >= 0.01, got 0.001"),
        ("burst = nan", "burst: expected float >= 0.01, got nan"),
        ("io_timeout = inf", "io_timeout: expected float <= 86400.0, got inf"),
        ("io_timeout = nan", "io_timeout: expected float > 0.0, got nan"),
        ('pool = "4K"', "pool: expected at least one request's 524288 bytes, got 4096"),
        ('backend = "file"', 'backend: expected a table with kind = "...", got "file"'),
        (
            "backend = { path = 'x' }",
            'backend.kind: expected a built-in kind or FILE.py, as in kind = "file"',
        ),
        ("backend.kind = 5", 'backend.kind: expected a built-in kind or FILE.py, as in kind = "file", got 5'),
        (
            'backend = { kind = "file", path = ["a"] }',
            'backend.path: expected a string, a number or a bool, got ["a"]',
        ),
        (
            'backend = { kind = "null", python = "env/python" }',
            "backend.python: no such program: {dir}/env/python; give the interpreter of an environment",
        ),
        (
            'backend = { kind = "null", layers = "readonly" }',
            'backend.layers: expected a list such as ["log:file=/x", "readonly"], got "readonly"',
        ),
        (
            'backend = { kind = "null", python = 3 }',
            "backend.python: expected the path of a Python interpreter, got 3",
        ),
        (
            'backend = { kind = "theirs", urls = ["a", ["b"]] }',
            'backend.urls: expected a string, a number or a bool, or a list of them, got ["a",["b"]]',
        ),
    ],
)
def test_a_bad_value_is_reported_with_its_device_and_key(tmp_path: Path, key: str, complaint: str) -> None:
    text = f'[daemon]\n\n[[device]]\nname = "a"\n[[device]]\nname = "b"\n{key}\n'
    assert complaints(tmp_path, text) == [f'device "b": {complaint.replace("{dir}", str(tmp_path))}']


@pytest.mark.parametrize("name", ["", ".hidden", "-x", "a/b", "a b", "é", "x" * 65, "new\nline", "end\n"])
def test_a_bad_name_is_refused(tmp_path: Path, name: str) -> None:
    text = f"[[device]]\nname = {msgspec.json.encode(name).decode()}\n"
    [complaint] = complaints(tmp_path, text)
    assert complaint.startswith("device[0].name: expected 1 to 64 letters, digits, '_', '.' or '-'")


@pytest.mark.parametrize("name", ["a", "0", "_", "vol-0.img_x", "x" * 64])
def test_a_good_name_is_taken(tmp_path: Path, name: str) -> None:
    assert load_config(write(tmp_path, f'[[device]]\nname = "{name}"\n')).devices[0].name == name


def test_an_unknown_key_suggests_the_nearest(tmp_path: Path) -> None:
    [complaint] = complaints(tmp_path, '[[device]]\nname = "a"\nqueus = 4\n')
    assert complaint.startswith('device "a": queus: unknown key, did you mean queues?; known: name, size,')


def test_unknown_tables_are_named(tmp_path: Path) -> None:
    text = "[demon]\nlog_level = 'info'\n[daemon]\nlog_levle = 'info'\n"
    assert complaints(tmp_path, text) == [
        "demon: unknown table; known: [daemon], [prepare], [metrics], [[device]]",
        "daemon.log_levle: unknown key, did you mean log_level?; "
        "known: run_dir, group, on_stop, log_level, log_format, state_dir, events, memory_max, user",
    ]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("prepare = 3", "prepare: expected a table: write [prepare]"),
        ("[prepare]\ncount = -1", "prepare.count: expected int >= 0, got -1"),
        ("[prepare]\ncount = 2\ndepht = 3", "prepare.depht: unknown key, did you mean depth?"),
        ("[prepare]\ncount = 2\nplacement = 'backend'", "prepare.placement: with isolation none null uses"),
        ("[prepare]\ncount = 2\npool = '4K'", "prepare.pool: expected at least one request's 524288 bytes"),
    ],
)
def test_a_shape_of_prepared_devices_that_cannot_be_is_named(
    tmp_path: Path, text: str, complaint: str
) -> None:
    (line,) = complaints(tmp_path, f"{text}\n")
    assert line.startswith(complaint)


def test_every_mistake_is_reported_in_the_order_of_the_devices(tmp_path: Path) -> None:
    text = '[[device]]\nqueues = 0\ndepth = 0\n[[device]]\nname = "b"\nid = "x"\n'
    assert complaints(tmp_path, text) == [
        "device[0].queues: expected int >= 1, got 0",
        "device[0].depth: expected int >= 1, got 0",
        "device[0].name: is missing",
        'device "b": id: expected int, got "x"',
    ]


@pytest.mark.parametrize("name", ["5", "[1]", "{ a = 1 }"])
def test_a_name_that_is_no_string_is_refused(tmp_path: Path, name: str) -> None:
    [complaint] = complaints(tmp_path, f"[[device]]\nname = {name}\n")
    assert complaint.startswith("device[0].name: expected str, got ")


def test_a_device_with_an_invalid_name_is_reported_by_its_index(tmp_path: Path) -> None:
    text = '[[device]]\nname = "a b"\nid = "x"\n'
    name, number = complaints(tmp_path, text)
    assert name.startswith("device[0].name: ") and number == 'device[0].id: expected int, got "x"'


def test_duplicates_are_named(tmp_path: Path) -> None:
    text = '[[device]]\nname = "a"\nid = 1\n[[device]]\nname = "a"\nid = 1\n'
    assert complaints(tmp_path, text) == [
        "device[1].name: 'a' is already taken by device[0]; choose another",
        "device[1].id: 1 is already taken by device[0]; choose another",
    ]


def test_backend_placement_needs_need_get_data(tmp_path: Path) -> None:
    text = '[[device]]\nname = "a"\nneed_get_data = false\nplacement = "backend"\n'
    [complaint] = complaints(tmp_path, text)
    assert complaint.startswith('device "a": placement: backend placement needs need_get_data')


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ('size = "1M"\nbackend.kind = "null"', "a backend would get none: remove backend"),
        ('size = "1M"\nplacement = "backend"', "no backend places writes: use placement pool"),
        ('size = "1M"\nneed_get_data = false', "need need_get_data: turn it on"),
        ("", "no backend has a size: set size"),
    ],
)
def test_answers_worker_excludes_a_backend_and_its_settings(tmp_path: Path, lines: str, reason: str) -> None:
    [complaint] = complaints(tmp_path, f'[[device]]\nname = "a"\nanswers = "worker"\n{lines}\n')
    assert complaint.startswith('device "a": answers: ') and complaint.endswith(reason)


def test_one_bracket_instead_of_two(tmp_path: Path) -> None:
    assert complaints(tmp_path, '\n[device]\nname = "a"\n') == [
        "device: expected an array of tables: write [[device]], with two brackets"
    ]


def test_a_daemon_that_is_no_table(tmp_path: Path) -> None:
    assert complaints(tmp_path, "daemon = 5\n") == ["daemon: expected a table: write [daemon]"]


def test_the_daemon_table_is_checked(tmp_path: Path) -> None:
    text = '[daemon]\nrun_dir = "relative"\ngroup = "no-such-group"\nlog_format = "xml"\nstate_dir = "x"\n'
    assert complaints(tmp_path, text) == [
        'daemon.log_format: expected auto or human or logfmt or json, got "xml"',
        "daemon.run_dir: expected an absolute path, got 'relative'",
        "daemon.state_dir: expected an absolute path, got 'x'",
        "daemon.group: no such group: no-such-group; create it with: groupadd --system no-such-group",
    ]


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("[daemon]\nlog_level =\n", "2: not TOML: "),
        ('a = 1\nb = "open', "2: not TOML: "),
        ("[a]\n[a]\n", "2: not TOML: "),
    ],
)
def test_a_syntax_error_carries_its_line(tmp_path: Path, text: str, start: str) -> None:
    [complaint] = complaints(tmp_path, text)
    assert complaint.startswith(start)
    assert "line" not in complaint.partition("TOML")[2]


def test_bytes_that_are_not_utf8_carry_their_line(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_bytes(b"# fine\n# \xff\n")
    with pytest.raises(ConfigError, match=r"x\.toml:2: not UTF-8: byte 0xff"):
        load_config(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: No such file or directory"):
        load_config(tmp_path / "none.toml")


def test_a_backend_file_is_meant_from_the_configs_directory(tmp_path: Path) -> None:
    text = '[[device]]\nname = "a"\nbackend.kind = "sub/../mine.py"\n'
    assert complaints(tmp_path, text) == [f'device "a": backend.kind: no such file: {tmp_path}/mine.py']
    (tmp_path / "mine.py").touch()
    [device] = load_config(write(tmp_path, text)).devices
    assert device.backend is not None
    assert device.backend.kind == str(tmp_path / "mine.py")


def test_a_device_survives_json() -> None:
    device = DeviceConfig(
        name="a", size_bytes=7 << 60, backend=BackendConfig(kind="memory", options={"x": "1"})
    )
    assert msgspec.json.decode(msgspec.json.encode(device), type=DeviceConfig) == device


@pytest.mark.parametrize(
    "text",
    [
        b'{"name":"a","placement":"backend","need_get_data":false}',
        b'{"name":"a","queues":0}',
        b'{"name":"a","extra":1}',
        b'{"name":"../a"}',
    ],
)
def test_a_device_from_json_is_checked_too(text: bytes) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(text, type=DeviceConfig)


def test_a_path_with_a_nul_is_refused_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('[daemon]\nrun_dir = "/run/a\\u0000b"\n')
    with pytest.raises(ConfigError, match=r"daemon\.run_dir: expected no NUL character$"):
        load_config(file)


def test_a_record_of_an_earlier_version_may_have_a_timeout_that_no_user_may_write() -> None:
    text = b'{"name":"a","io_timeout_s":0.0005}'
    assert msgspec.json.decode(text, type=DeviceConfig).io_timeout_s == 0.0005
