"""Control commands of an ordinary user: each names the node, and some are other ones than root's."""

import errno
from pathlib import Path

import pytest
from click.testing import CliRunner

from ublkpool.daemon.cli.commands import cli
from ublkpool.daemon.kernel import device_commands, own_node
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.daemon.settings.user_devices import fitted
from ublkpool.ublk import control
from ublkpool.ublk.abi import Control, DeviceInfo, Feature, Parameters
from ublkpool.ublk.errors import UblkError, UnsupportedError

NUMBER = 7
PATH = b"/dev/ublkc7"


class Driver:
    """Answers commands as the driver does, with the data behind the path; notes what it was sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[Control, bytes]] = []
        self.device: DeviceInfo | None = DeviceInfo(
            device_number=NUMBER, flags=Feature.UNPRIVILEGED_DEV, owner_uid=1000, owner_gid=100
        )
        self.refuses: dict[Control, int] = {}

    def exchange(
        self, command: Control, device: int, sent: bytearray, path_bytes: int, data: int, queue: int = 0
    ) -> int:
        self.sent.append((command, bytes(sent[:path_bytes])))
        if code := self.refuses.get(command):
            raise UblkError(command.name, code)
        if command in (Control.GET_DEV_INFO, Control.GET_DEV_INFO2):
            if self.device is None:
                raise UblkError(command.name, errno.ENODEV)
            sent[path_bytes:] = self.device.pack()
        elif command is Control.GET_FEATURES:
            sent[path_bytes:] = (0x1FFFFF).to_bytes(8, "little")
        elif command is Control.ADD_DEV:
            sent[path_bytes:] = DeviceInfo.unpack(bytes(sent))._replace(device_number=NUMBER).pack()
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """The driver of a process without rights."""
    made = Driver()
    monkeypatch.setattr(control, "_exchange", made.exchange)
    for module in (control, device_commands):
        monkeypatch.setattr(module, "is_privileged", lambda: False)
    return made


def test_an_ordinary_users_commands_name_the_node_before_their_data(driver: Driver) -> None:
    assert control.device_info(NUMBER) == driver.device
    control.start_device(NUMBER, 1)
    control.set_parameters(NUMBER, Parameters(size_bytes=1 << 20, max_io_bytes=4096))
    assert [path for _, path in driver.sent] == [PATH] * 3


def test_commands_that_are_about_no_device_name_none(driver: Driver) -> None:
    control.get_features()
    control.add_device(DeviceInfo())
    assert [path for _, path in driver.sent] == [b"", b""]


def test_root_names_the_node_only_where_the_driver_reads_it(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "is_privileged", lambda: True)
    control.device_info(NUMBER)
    control.device_info_by_path(NUMBER)
    assert driver.sent == [(Control.GET_DEV_INFO, b""), (Control.GET_DEV_INFO2, PATH)]


def create() -> device_commands.Created:
    config = fitted(DeviceConfig(name="vol", queues=1))
    return device_commands.create(config, Parameters(size_bytes=1 << 20, max_io_bytes=524288), 1, 5)


def test_a_new_device_is_given_no_command_before_its_node_is_the_users(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[int] = []

    def wait(number: int) -> None:
        assert [command for command, _ in driver.sent][-1] is Control.ADD_DEV
        waited.append(number)

    monkeypatch.setattr(device_commands, "await_own_node", wait)
    assert create().info.flags & Feature.UNPRIVILEGED_DEV
    assert waited == [NUMBER]


def test_as_many_devices_as_users_may_have_are_named_with_the_limit(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limit = tmp_path / "ublks_max"
    limit.write_text("64\n")
    monkeypatch.setattr(device_commands, "_USERS_DEVICES_MAX", limit)
    driver.refuses[Control.ADD_DEV] = errno.EACCES
    with pytest.raises(UnsupportedError, match=rf"as many ublk devices as they may \(64\): .*{limit}"):
        create()


def test_a_node_that_udev_has_not_given_away_is_named_with_the_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_node, "node_path", lambda number: f"/nonexistent/ublkc{number}")
    with pytest.raises(UblkError) as refused:
        own_node.await_own_node(NUMBER, 0.05)
    assert refused.value.errno == errno.EACCES
    for each in ("/nonexistent/ublkc7", "99-ublkpool.users.rules", "ublkpool del lost-7"):
        assert each in str(refused.value)


def test_an_ordinary_users_device_is_deleted_by_the_command_that_the_driver_takes(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = tmp_path / "sent"
    monkeypatch.setattr(control, "delete_device", lambda number: noted.write_text(f"DEL_DEV {number}"))
    assert device_commands.delete(NUMBER, 0)
    assert noted.read_text() == f"DEL_DEV {NUMBER}"


def test_a_deletion_that_the_driver_refuses_is_an_error(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.refuses[Control.DEL_DEV] = errno.EACCES
    with pytest.raises(UblkError) as refused:
        device_commands.delete(NUMBER, 0)
    assert refused.value.errno == errno.EACCES


def test_a_deletion_that_a_holder_keeps_waiting_is_not_waited_for(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    import signal

    monkeypatch.setattr(control, "delete_device", lambda number: signal.pause())
    monkeypatch.setattr(device_commands, "DELETE_PATIENCE_S", 0.1)
    assert not device_commands.delete(NUMBER, 0)


@pytest.mark.parametrize("node", ["ublkc7", "ublkb7", "/dev/ublkb7p3"])
def test_udev_is_told_the_owner_of_a_users_node(driver: Driver, node: str) -> None:
    ran = CliRunner().invoke(cli, ["node-owner", node])
    assert (ran.exit_code, ran.stdout) == (0, "1000 100\n")
    assert driver.sent == [(Control.GET_DEV_INFO2, PATH)]


def test_udev_is_told_no_owner_of_roots_node(driver: Driver) -> None:
    driver.device = DeviceInfo(device_number=NUMBER)
    ran = CliRunner().invoke(cli, ["node-owner", "ublkc7"])
    assert (ran.exit_code, ran.stdout) == (1, "")


def test_only_a_node_of_the_driver_has_an_owner_to_ask_for(driver: Driver) -> None:
    ran = CliRunner().invoke(cli, ["node-owner", "sda"])
    assert ran.exit_code == 2 and "such as ublkc0" in ran.stderr
