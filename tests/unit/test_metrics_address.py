"""Where metrics are served: what the config and the command line accept, and what they say of a bad value."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from ublkpool.daemon.cli import options
from ublkpool.daemon.cli.commands import cli
from ublkpool.daemon.errors import ConfigError
from ublkpool.daemon.settings.config_file import load_config
from ublkpool.daemon.settings.listen import ListenAddress, parse_listen

RUN_DIR = Path("/run/test")


@pytest.mark.parametrize(
    ("text", "address", "shown"),
    [
        ("127.0.0.1:9847", ListenAddress(host="127.0.0.1", port=9847), "127.0.0.1:9847"),
        ("localhost:0", ListenAddress(host="127.0.0.1", port=0), "127.0.0.1:0"),
        ("[::1]:9847", ListenAddress(host="::1", port=9847), "[::1]:9847"),
        ("0.0.0.0:65535", ListenAddress(host="0.0.0.0", port=65535), "0.0.0.0:65535"),
        ("unix", ListenAddress(path=RUN_DIR / "metrics.sock"), "unix:/run/test/metrics.sock"),
        ("unix:/run/x.sock", ListenAddress(path=Path("/run/x.sock")), "unix:/run/x.sock"),
    ],
)
def test_an_address_is_taken_apart(text: str, address: ListenAddress, shown: str) -> None:
    assert parse_listen(text, RUN_DIR) == address
    assert str(address) == shown


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", r"expected ADDRESS:PORT"),
        ("9847", r"expected ADDRESS:PORT .* got '9847'"),
        (":9847", r"expected ADDRESS:PORT"),
        ("example.org:9847", r"expected a numeric address or localhost .* got 'example\.org:9847'"),
        ("127.0.0.1:", r"expected a port from 0 to 65535"),
        ("127.0.0.1:65536", r"expected a port from 0 to 65535"),
        ("127.0.0.1:-1", r"expected a port from 0 to 65535"),
        ("127.0.0.1:\uff180", r"expected a port from 0 to 65535"),
        ("127.0.0.1:" + "9" * 5000, r"expected a port from 0 to 65535"),
        ("::1:9847", r"an IPv6 address has brackets"),
        ("[127.0.0.1]:9847", r"an IPv6 address has brackets"),
        ("unix:", r"expected an absolute path after unix:"),
        ("unix:metrics.sock", r"expected an absolute path after unix:"),
        ("unix:/run/", r"expected an absolute path after unix:"),
        ("unix:/a\0b", r"expected an absolute path after unix:"),
        ("unix:/" + "x" * 107, r"too long for a socket"),
    ],
)
def test_a_bad_address_is_one_line_in_the_config_and_on_the_command_line(
    text: str, complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse_listen(text, RUN_DIR)
    if "\0" in text:
        return
    config = tmp_path / "x.toml"
    config.write_text(f"[metrics]\nlisten = '{text}'\n")
    with pytest.raises(ConfigError, match=complaint) as caught:
        load_config(config)
    assert [line.startswith(f"{config}: metrics.listen: ") for line in caught.value.lines] == [True]
    for command in (("serve", "--metrics"), ("metrics", "--listen")):
        result = CliRunner().invoke(cli, [*command, text], prog_name="ublkpool")
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1)


def test_the_config_names_the_default_socket_in_its_run_directory(tmp_path: Path) -> None:
    config = tmp_path / "x.toml"
    config.write_text("[daemon]\nrun_dir = '/run/other'\n[metrics]\nlisten = 'unix'\n")
    assert load_config(config).metrics == ListenAddress(path=Path("/run/other/metrics.sock"))
    assert load_config(config, tmp_path).metrics == ListenAddress(path=tmp_path / "metrics.sock")
    config.write_text("")
    assert load_config(config).metrics is None


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ("metrics = 1", "metrics: expected a table: write [metrics]"),
        ("[metrics]", "metrics.listen: is missing"),
        ("[metrics]\nlisten = 9847", "metrics.listen: expected str, got 9847"),
        (
            "[metrics]\nlisten = 'unix'\nport = 1",
            "metrics.port: unknown key; known: listen",
        ),
    ],
)
def test_a_bad_table_is_one_line(table: str, complaint: str, tmp_path: Path) -> None:
    config = tmp_path / "x.toml"
    config.write_text(table)
    with pytest.raises(ConfigError) as caught:
        load_config(config)
    assert caught.value.lines == [f"{config}: {complaint}"]


@pytest.mark.parametrize("command", [("serve", "--metrics", "unix"), ("metrics",)])
def test_a_missing_library_is_one_line(command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "METRICS_PACKAGES", ("no_such_package",))
    result = CliRunner().invoke(cli, command, prog_name="ublkpool")
    assert result.exit_code == 2
    assert result.stderr == (
        "ublkpool: metrics need the Python package no_such_package: pip install 'ublkpool[metrics]' "
        f"(see ublkpool {command[0]} --help)\n"
    )
