"""The daemon of an ordinary user: its rights, directories and devices."""

import os
from pathlib import Path

import pytest

from ublkpool.daemon.device.state import candidates
from ublkpool.daemon.errors import ConfigError
from ublkpool.daemon.kernel.disk_parameters import wanted_flags
from ublkpool.daemon.settings import user_directories
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.daemon.settings.user_devices import ANSWER_S_MAX, all_fitted, check_fits, fitted
from ublkpool.daemon.settings.user_directories import usual_run_dir, usual_state_dir
from ublkpool.ublk import privilege
from ublkpool.ublk.abi import Feature
from ublkpool.ublk.privilege import is_in_user_namespace, is_privileged

EVERY_FEATURE = 0x1FFFFF


@pytest.fixture
def ordinary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """This process as an ordinary user's; the directory that stands for /run/user/UID."""
    monkeypatch.setattr(user_directories, "is_ordinary", lambda: True)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("HOME", "/home/anna")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    return tmp_path


def test_only_a_capability_in_the_first_user_namespace_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert is_privileged.__wrapped__() == (os.geteuid() == 0 and not is_in_user_namespace())
    monkeypatch.setattr(privilege, "is_in_user_namespace", lambda: True)
    assert not is_privileged.__wrapped__()


def test_a_child_in_a_user_namespace_is_in_another_one() -> None:
    import subprocess

    words = ["unshare", "-Ur", "stat", "-Lc", "%i", "/proc/self/ns/user"]
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    if ran.returncode:
        pytest.skip(f"no user namespace may be made here: {ran.stderr}")
    assert int(ran.stdout) != privilege._FIRST_USER_NAMESPACE


def test_an_ordinary_users_daemon_serves_below_the_runtime_directory(ordinary: Path) -> None:
    assert usual_run_dir(serves=True) == ordinary / "ublkpool"


def test_a_users_commands_go_to_the_own_daemon_if_it_is_there_else_to_roots(ordinary: Path) -> None:
    assert usual_run_dir() == Path("/run/ublkpool")
    (ordinary / "ublkpool").mkdir()
    assert usual_run_dir() == ordinary / "ublkpool"


def test_roots_daemon_serves_in_run_whatever_the_environment_says(
    ordinary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(user_directories, "is_ordinary", lambda: False)
    assert usual_run_dir(serves=True) == Path("/run/ublkpool")
    assert usual_state_dir() is None


@pytest.mark.parametrize("named", ["", "run/user/1"])
def test_without_a_runtime_directory_the_usual_one_is_taken(
    ordinary: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", named)
    assert usual_run_dir(serves=True) == Path("/run/ublkpool")


def test_a_users_state_is_below_the_home(ordinary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Path("/home/anna/.local/state/ublkpool")
    assert candidates(ordinary / "ublkpool", None) == [home]
    assert candidates(Path("/x/run"), None) == [home / "at/x/run", Path("/x/run.state")]
    monkeypatch.setenv("XDG_STATE_HOME", "/states")
    assert candidates(ordinary / "ublkpool", None) == [Path("/states/ublkpool")]


def test_a_users_device_has_no_recovery_and_answers_before_the_kernel_loses_patience() -> None:
    made = fitted(DeviceConfig(name="vol", absent_timeout_s=5))
    assert (made.recovery, made.on_timeout, made.on_absent) == ("none", "fail", "fail")
    assert (made.io_timeout_s, made.absent_timeout_s) == (ANSWER_S_MAX, 5)
    check_fits(made)


@pytest.mark.parametrize("recovery", ["abort", "fail"])
def test_a_recovery_that_was_asked_for_is_refused(recovery: str) -> None:
    devices = [DeviceConfig(name=name, recovery=recovery) for name in ("a", "b")]  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as refused:
        all_fitted([*devices, DeviceConfig(name="c")])
    assert [line.partition(":")[0] for line in refused.value.lines] == ["a", "b"]
    assert all("ordinary user" in line and "leave recovery out" in line for line in refused.value.lines)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("io_timeout_s", 21.0, "io_timeout: at most 20"),
        ("absent_timeout_s", 60.0, "absent_timeout: at most 20"),
        ("on_timeout", "wait", "on_timeout: only fail"),
        ("on_absent", "wait", "on_absent: only fail"),
    ],
)
def test_a_setting_that_the_kernel_would_not_wait_for_is_refused(key: str, value: object, says: str) -> None:
    import msgspec

    config = msgspec.structs.replace(fitted(DeviceConfig(name="vol")), **{key: value})
    with pytest.raises(ConfigError, match=f"vol: {says}"):
        check_fits(config)


def test_an_ordinary_users_device_is_asked_for_as_one() -> None:
    config = fitted(DeviceConfig(name="vol"))
    flags = wanted_flags(config, EVERY_FEATURE, is_privileged=False)
    assert Feature.UNPRIVILEGED_DEV in flags
    assert not flags & (Feature.USER_RECOVERY | Feature.USER_RECOVERY_REISSUE | Feature.QUIESCE)
    assert Feature.UNPRIVILEGED_DEV not in wanted_flags(config, EVERY_FEATURE)
