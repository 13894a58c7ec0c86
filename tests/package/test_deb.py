"""The Debian package in a clean Debian, through its life; `make package`.

Needs root, for the chroot.
"""

import json
import subprocess
from collections.abc import Iterator

import click
import pytest

from support.package import BY_HAND, STATE, STORES, Life, debian_root, live, package_file
from ublkpool.daemon.cli.commands import cli
from ublkpool.daemon.cli.volume import volume

COMPLETION = (
    "usr/share/bash-completion/completions/ublkpool",
    "usr/share/zsh/vendor-completions/_ublkpool",
    "usr/share/fish/vendor_completions.d/ublkpool.fish",
)
BESIDES = (
    "usr/lib/systemd/system/ublkpool-backend@.service",
    "usr/lib/systemd/system/ublkpool-shutdown.service",
    "usr/lib/udev/rules.d/99-ublkpool.rules",
    "usr/lib/sysusers.d/ublkpool.conf",
    "usr/lib/systemd/user/ublkpool.service",
    "usr/share/ublkpool/99-ublkpool.users.rules",
    "usr/share/ublkpool/ublkpool-hardening.conf",
    "usr/share/ublkpool/examples/demo_null.py",
    "usr/share/doc/ublkpool/OPERATIONS.md",
    "usr/share/doc/ublkpool/copyright",
    *COMPLETION,
)


@pytest.fixture(scope="module", params=[pytest.param("bookworm", marks=pytest.mark.long), "trixie"])
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Life]:
    """The life of the package that `make deb` built in a clean root of the suite."""
    scratch = tmp_path_factory.mktemp("deb")
    root = scratch / "root"
    try:
        debian_root(request.param, root)
        yield live(root, package_file(), scratch)
    finally:
        subprocess.run(["rm", "-rf", str(root)], check=True)


# Its installation takes longer than all of these tests.
@pytest.mark.long
def test_lintian_finds_no_error() -> None:
    command = ["lintian", "--fail-on=error", "--allow-root", str(package_file())]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_it_runs_without_a_driver_with_nothing_but_debian_s_python(seen: Life) -> None:
    version = seen.said["python"].strip()
    assert seen.said["version"].split() == ["ublkpool", version]
    assert package_file().name.startswith(f"ublkpool_{version}_")
    report = json.loads(seen.said["doctor"])
    assert {"driver", "run-directory", "state-directory"} <= {each["check"] for each in report["findings"]}
    assert "every promise was kept" in seen.said["check"]


def test_it_enables_no_daemon_in_users_sessions(seen: Life) -> None:
    installed, clean = (
        {each for each in seen.files[when] if each.startswith("etc/systemd/user/")}
        for when in ("installed", "clean")
    )
    assert installed == clean
    assert "usr/lib/systemd/user/ublkpool.service" in seen.files["installed"]


def test_each_command_has_its_page_and_all_that_a_machine_needs_is_there(seen: Life) -> None:
    files = seen.files["installed"].keys()
    pages = {each.rpartition("/")[2] for each in files if each.startswith("usr/share/man/man1/ublkpool")}
    of_volumes = [f"volume {each}" for each in volume.commands]
    names = [*cli.list_commands(click.Context(cli)), "backend check", *of_volumes]
    assert pages == {"ublkpool.1.gz", *(f"ublkpool-{name.replace(' ', '-')}.1.gz" for name in names)}
    assert [each for each in BESIDES if each not in files] == []
    assert seen.said["group"].startswith("ublkpool:")
    assert seen.said["user"].startswith("ublkpool-worker:")
    # Debian 12's systemd ignores keys that it does not know.
    said = [each for each in seen.said["units"].splitlines() if "Unknown key" not in each]
    assert [each for each in said if "ublkpool" in each] == []


def test_its_units_run_its_own_command(seen: Life) -> None:
    commands = [each.partition("=")[2] for each in seen.said["commands"].splitlines()]
    ours = [each for each in commands if not each.startswith("-systemctl kill")]
    assert len(ours) >= 5
    assert [each for each in ours if not each.startswith("/usr/bin/ublkpool ")] == []


def test_what_was_installed_by_hand_is_named(seen: Life) -> None:
    assert "/etc/systemd/system/ublkpool.service is used in place" in seen.said["by hand"]
    assert "/usr/local/bin/ublkpool answers to the command ublkpool" in seen.said["by hand"]


def test_an_upgrade_and_a_removal_keep_the_config(seen: Life) -> None:
    assert seen.config["mine"].endswith("# mine\n")
    assert seen.config["upgrade"] == seen.config["remove"] == seen.config["mine"]


def test_it_is_not_removed_while_devices_are_served_without_a_daemon(seen: Life) -> None:
    assert "is not removed: no daemon answers, and its devices" in seen.said["remove without daemon"]
    assert seen.said["version after refusal"] == seen.said["version"]


def test_a_purge_beside_an_installation_by_hand_keeps_all_that_it_may_use(seen: Life) -> None:
    assert f"/{BY_HAND[0]} is not the package's" in seen.said["purge by hand"]
    assert seen.files["purged by hand"] == seen.files["removed"]


def test_a_removal_keeps_what_the_daemon_knows_and_a_purge_keeps_the_operator_s_files(seen: Life) -> None:
    removed = seen.files["removed"].keys()
    assert [each for each in (*STATE, *STORES) if f"var/lib/ublkpool/{each}" not in removed] == []
    assert [each for each in removed if each.startswith(("usr/bin/ublkpool", "usr/lib/ublkpool"))] == []
    assert seen.said["kept"].split() == sorted(STORES)
    assert "/var/lib/ublkpool stays: it has files that no daemon wrote" in seen.said["purge"]


def test_a_purge_leaves_nothing_else(seen: Life) -> None:
    clean, purged = seen.files["clean"], seen.files["purged"]
    assert sorted(purged.keys() ^ clean.keys()) == []
    assert purged == clean
