"""Which settings of a device can change while it serves, and the config that a change makes."""

import re
from pathlib import Path

import msgspec
import pytest

from ublkpool.daemon.errors import ConfigError
from ublkpool.daemon.settings.changes import (
    APPLIES,
    Scalar,
    changed,
    differences,
    shown,
    user_key,
    wanted_now,
)
from ublkpool.daemon.settings.config import BackendConfig, DeviceConfig

GUIDE = Path(__file__).parents[2] / "docs" / "OPERATIONS.md"
FILE = BackendConfig(kind="file", options={"path": "/a", "size": "1G"}, cwd="/")
VOL = DeviceConfig(name="vol", size_bytes=1 << 20)
MANAGED = DeviceConfig(name="vol", backend=FILE)


def complaint(values: dict[str, Scalar], config: DeviceConfig = VOL) -> str:
    with pytest.raises(ConfigError) as refused:
        changed(config, values)
    assert refused.value.status == 2
    return str(refused.value)


def test_every_field_of_a_device_is_decided() -> None:
    assert {user_key(field) for field in DeviceConfig.__struct_fields__} - {"name"} == set(APPLIES)


def test_the_guide_says_of_every_setting_when_a_change_applies() -> None:
    section = GUIDE.read_text().partition("## Changing a device that serves\n")[2].partition("\n## ")[0]
    told = {
        key: when.strip()
        for keys, when in re.findall(r"^\| (`[^|]+) \| ([^|]+)\|", section, re.MULTILINE)
        for key in re.findall(r"`(\w+)`", keys)
    }
    assert told == APPLIES


def test_deadlines_and_policies_change() -> None:
    values: dict[str, Scalar] = {
        "io_timeout": 5,
        "on_timeout": "fail",
        "absent_timeout": 0.5,
        "on_absent": "fail",
    }
    expected = msgspec.structs.replace(
        VOL, io_timeout_s=5.0, on_timeout="fail", absent_timeout_s=0.5, on_absent="fail"
    )
    assert changed(VOL, values) == expected
    assert differences(VOL, expected) == list(values)
    assert VOL.io_timeout_s == 30.0


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"io_timeout": 0}, "io_timeout: expected float > 0.0, got 0"),
        ({"io_timeout": 0.0001}, "io_timeout: expected at least 0.001 (a millisecond), got 0.0001"),
        ({"io_timeout": 1e9}, "io_timeout: expected float <= 86400.0, got 1000000000.0"),
        ({"io_timeout": "soon"}, 'io_timeout: expected float, got "soon"'),
        ({"io_timeout": True}, "io_timeout: expected float, got true"),
        ({"on_timeout": "fial"}, 'on_timeout: expected wait or fail, got "fial", did you mean fail?'),
        ({"io_timout": 3}, "io_timout: unknown key, did you mean io_timeout?; known: "),
        ({"queues": 2}, "queues: is fixed when the device is made: del the device, then add it"),
        ({"name": "other"}, "name: is fixed when the device is made"),
        ({"backend": "file"}, "backend: write backend.KEY=VALUE"),
        ({"backend.path": "/b"}, "backend.path: the daemon runs no backend for this device"),
        ({"": 1}, ": unknown key"),
    ],
)
def test_a_value_that_cannot_be_is_one_line_that_names_it(values: dict[str, Scalar], expected: str) -> None:
    said = complaint(values)
    assert said.startswith(expected) and "\n" not in said


def test_every_mistake_is_named_at_once() -> None:
    said = complaint({"io_timeout": -1, "on_absent": "wait", "on_timeout": "x", "depth": 4})
    assert sorted(line.partition(":")[0] for line in said.splitlines()) == [
        "depth",
        "io_timeout",
        "on_timeout",
    ]


def test_an_option_of_the_backend_is_replaced_or_added_and_the_others_stay() -> None:
    new = changed(MANAGED, {"backend.size": "2G", "backend.sync": True}).backend
    assert new is not None and new.kind == "file" and new.cwd == "/"
    assert new.options == {"path": "/a", "size": "2G", "sync": "true"}
    assert FILE.options == {"path": "/a", "size": "1G"}


@pytest.mark.parametrize("key", ["kind", "layers", "python", "cwd", ""])
def test_what_is_no_option_of_a_backend_is_refused(key: str) -> None:
    assert complaint({f"backend.{key}": "x"}, MANAGED) == f"backend.{key}: is no option of a backend"


def test_what_a_config_wants_is_taken_as_far_as_it_can_change() -> None:
    wanted = msgspec.structs.replace(
        MANAGED,
        queues=4,
        io_timeout_s=7.0,
        backend=BackendConfig(kind="file", options={"path": "/a"}, layers=("log",)),
    )
    taken = wanted_now(MANAGED, wanted)
    assert differences(taken, wanted) == ["queues"]
    assert taken.backend == wanted.backend and taken.io_timeout_s == 7.0


@pytest.mark.parametrize("other", [None, BackendConfig(kind="memory")])
def test_another_kind_of_backend_or_none_needs_a_new_device(other: BackendConfig | None) -> None:
    wanted = msgspec.structs.replace(MANAGED, size_bytes=1 << 20, backend=other)
    assert differences(wanted_now(MANAGED, wanted), wanted) == ["size", "backend"]


def test_values_are_shown_as_users_write_them() -> None:
    assert [shown(VOL, key) for key in ("io_timeout", "on_absent", "rings", "size", "backend")] == [
        "30",
        "wait",
        "true",
        "1048576",
        "-",
    ]
    assert shown(MANAGED, "backend") == "file path=/a size=1G"
