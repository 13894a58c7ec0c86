"""Logging, notifying systemd, rendering for terminals, and the files in config/."""

import configparser
import io
import json
import logging
import socket
from pathlib import Path

import msgspec
import pytest

from ublkpool.daemon import logs, notify
from ublkpool.daemon.cli import render
from ublkpool.daemon.status import BackendStatus, DeviceStats, DeviceStatus, QueueStats, State

CONFIG = Path(__file__).parents[2] / "config"


@pytest.fixture
def logger() -> logging.Logger:
    return logging.getLogger("ublkpool.test")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_human_format_is_a_readable_line(logger: logging.Logger) -> None:
    stream = Terminal()
    logs.configure("info", "auto", stream)
    logger.debug("not shown")
    logger.info("device %s is live", "vol0", extra={"fields": {"path": "/dev/ublkb0", "why": "a b"}})
    line = stream.getvalue()
    assert line[12:] == ' info    test: device vol0 is live path=/dev/ublkb0 why="a b"\n'


def test_the_machine_formats_are_logfmt_and_json(logger: logging.Logger) -> None:
    stream = io.StringIO()
    logs.configure("debug", "auto", stream)
    logger.warning('two "words"', extra={"fields": {"pid": 7, "empty": ""}})
    assert 'level=warning logger=test message="two \\"words\\"" pid=7 empty=""\n' in stream.getvalue()
    stream = io.StringIO()
    logs.configure("debug", "json", stream)
    logger.error("x", exc_info=ValueError("y"), extra={"fields": {"pid": 7}})
    record = json.loads(stream.getvalue())
    assert (record["level"], record["message"], record["pid"]) == ("error", "x", 7)
    assert "ValueError: y" in record["traceback"]


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_notified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    address = f"@{tmp_path}/notify" if abstract else f"{tmp_path}/notify"
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.settimeout(5)
        systemd.bind(address.replace("@", "\0"))
        notify.ready("2 devices")
        notify.status("3 devices")
        notify.stopping()
        assert systemd.recv(100) == b"READY=1\nSTATUS=2 devices"
        assert systemd.recv(100) == b"STATUS=3 devices"
        assert systemd.recv(100) == b"STOPPING=1"


@pytest.mark.parametrize("fault", ["gone", "deaf"])
def test_a_service_manager_that_does_not_listen_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        if fault == "deaf":
            systemd.bind(str(tmp_path / "notify"))
        for _ in range(1000 if fault == "deaf" else 1):
            notify.status("serving")


@pytest.mark.parametrize(
    ("devices", "said"),
    [
        ([], "serving 0 devices"),
        ([("a", "live")], "serving 1 device"),
        (
            [("a", "live"), ("b", "waiting"), ("c", "failed"), ("d", "recovering"), ("e", "waiting")],
            "serving 1 device; waiting for b, e; recovering d; failed c",
        ),
        (
            [(f"v{number}", "waiting") for number in range(10)],
            "serving 0 devices; waiting for v0, v1, v2, v3, v4, v5, v6, v7 and 2 more",
        ),
    ],
)
def test_the_status_line_names_missing_and_failed_devices(
    devices: list[tuple[str, State]], said: str
) -> None:
    assert notify.describe(devices) == said


def test_without_notify_socket_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    opened: list[object] = []
    monkeypatch.setattr(socket, "socket", lambda *kind: opened.append(kind))
    notify.ready()
    assert opened == []


DEVICE = DeviceStatus(
    name="vol0",
    id=0,
    path=None,
    state="failed",
    size_bytes=None,
    queues=1,
    depth=128,
    need_get_data=True,
    placement="pool",
    recovery="reissue",
    backend=BackendStatus(kind="file", pid=5, attached=False),
    reason="[no such] file",
)


def test_a_terminal_gets_the_same_words_as_a_file() -> None:
    table = render.device_table([DEVICE])
    terminal, file = Terminal(), io.StringIO()
    render.print_table(table, terminal)
    render.print_table(table, file)
    for word in ("vol0", "failed", "NAME"):
        assert word in terminal.getvalue()
    assert "file (pid 5), not attached  [no such] file\n" in file.getvalue()


LONG_NAME = "a-rather-long-name-of-a-device-1"
WORDY = msgspec.structs.replace(
    DEVICE,
    name=LONG_NAME,
    path="/dev/ublkb1048575",
    reason=f"backend file ended: path=/srv/{'x' * 90}: is small",
)


@pytest.mark.parametrize("columns", ["80", "60", "200"])
def test_on_a_narrow_terminal_nothing_is_cut(monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    numbers = DeviceStats(name=LONG_NAME, reason=WORDY.reason, queues=(QueueStats(queue=0),))
    for table in (render.device_table([DEVICE, WORDY]), *render.stats_tables([numbers])):
        terminal = Terminal()
        render.print_table(table, terminal)
        lines = terminal.getvalue().splitlines()
        words = [word for row in table.rows for value in row for word in value.split()]
        assert not [word for word in words if word not in terminal.getvalue().split()]
        # Only the one path that is longer than a line is.
        assert all(len(line) <= int(columns) or "xxx" in line for line in lines)
        for row in table.rows:
            begins = [line for line in lines if line.startswith(row[0])]
            assert begins and all(key in begins[0].split() for key in row[: table.keys] if key)


def test_a_terminal_that_is_wide_enough_gets_the_table_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    terminal, file = Terminal(), io.StringIO()
    for out in (terminal, file):
        render.print_table(render.device_table([DEVICE]), out)
    assert terminal.getvalue() == file.getvalue()


def test_stats_show_why_a_device_does_not_serve() -> None:
    _, pools = render.stats_tables([DeviceStats(name="vol0", reason="no backend is attached")])
    assert "no backend is attached" in render.plain_text(pools)


def test_a_device_whose_workers_answer_shows_them_as_its_backend() -> None:
    alone = msgspec.structs.replace(DEVICE, answers="worker", backend=BackendStatus(), reason="")
    assert render.device_table([alone]).rows[0][-2:] == ("its workers", "")


def test_every_row_is_as_long_as_its_headers() -> None:
    stats = [DeviceStats(name="a", queues=(QueueStats(queue=0), QueueStats(queue=1)))]
    for table in (render.device_table([DEVICE]), *render.stats_tables(stats)):
        assert table.rows
        assert all(len(row) == len(table.headers) for row in table.rows)


def read_unit(name: str) -> configparser.ConfigParser:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    assert unit.read(CONFIG / name)
    return unit


@pytest.mark.parametrize("name", ["ublkpool.service", "ublkpool-backend@.service"])
def test_one_processs_death_neither_stops_the_unit_nor_ends_its_restarts(name: str) -> None:
    unit = read_unit(name)
    assert unit["Service"]["OOMPolicy"] == "continue"
    assert unit["Unit"]["StartLimitIntervalSec"] == "0"
    assert {"RestartSec", "RestartSteps", "RestartMaxDelaySec"} <= set(unit["Service"])


@pytest.mark.parametrize("name", ["ublkpool.service", "ublkpool-backend@.service"])
def test_the_machine_s_shutdown_stops_nothing_that_serves_a_mounted_disk(name: str) -> None:
    unit = read_unit(name)["Unit"]
    assert unit["DefaultDependencies"] == "no"
    # The shutdown stops a template's own slice and every process in it.
    assert read_unit(name)["Service"].get("Slice", "system.slice") == "system.slice"
    assert "@" not in name or "Slice" in read_unit(name)["Service"]
    assert "Conflicts" not in unit
    assert not {"Requires", "BindsTo", "PartOf"} & set(unit)
    assert unit["Before"] == unit["Wants"] == "remote-fs-pre.target"


def test_the_devices_end_after_all_mounts() -> None:
    unit = read_unit("ublkpool-shutdown-final.service")
    assert unit["Unit"]["After"].split() == ["shutdown.target", "umount.target"]
    assert unit["Install"]["WantedBy"] == unit["Unit"]["Before"] == "final.target"
    assert read_unit("ublkpool-shutdown.service")["Install"]["WantedBy"] == "shutdown.target"


def test_the_unit_can_reach_what_the_daemon_needs() -> None:
    service = read_unit("ublkpool.service")["Service"]
    assert service["Type"] == "notify"
    assert service["LimitMEMLOCK"] == "infinity"
    breaking = {"PrivateDevices", "ProtectClock", "ProtectKernelTunables", "PrivateTmp", "PrivateIPC"}
    assert not breaking & set(service)


def test_the_udev_rule_turns_the_watch_off() -> None:
    rules = (CONFIG / "99-ublkpool.rules").read_text().splitlines()
    assert 'SUBSYSTEM=="block", KERNEL=="ublkb*", OPTIONS+="nowatch"' in rules
