"""The module `nbdkit` that plugins import: its constants, its functions, and the texts that these read."""

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from support.nbdkit.plugins import NEEDED, Plugin, opened
from ublkpool.bufpool.sdk.nbdkit.api import Api


@pytest.fixture
def ended() -> list[str]:
    return []


@pytest.fixture
def nbdkit(ended: list[str]) -> ModuleType:
    return Api(ended.append).module()


def test_the_constants_are_those_of_nbdkits_header(nbdkit: ModuleType) -> None:
    constants = {name: value for name, value in vars(nbdkit).items() if name.isupper()}
    assert constants == {
        "THREAD_MODEL_SERIALIZE_CONNECTIONS": 0,
        "THREAD_MODEL_SERIALIZE_ALL_REQUESTS": 1,
        "THREAD_MODEL_SERIALIZE_REQUESTS": 2,
        "THREAD_MODEL_PARALLEL": 3,
        "FLAG_MAY_TRIM": 1,
        "FLAG_FUA": 2,
        "FLAG_REQ_ONE": 4,
        "FLAG_FAST_ZERO": 8,
        "FUA_NONE": 0,
        "FUA_EMULATE": 1,
        "FUA_NATIVE": 2,
        "CACHE_NONE": 0,
        "CACHE_EMULATE": 1,
        "CACHE_NATIVE": 2,
        "EXTENT_HOLE": 1,
        "EXTENT_ZERO": 2,
    }


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("511", 511),
        ("7k", 7 << 10),
        ("17M", 17 << 20),
        ("3g", 3 << 30),
        ("1T", 1 << 40),
        ("2p", 2 << 50),
        ("1E", 1 << 60),
        ("8s", 4096),
        ("9b", 9),
        (" 12", 12),
        (str((1 << 63) - 1), (1 << 63) - 1),
    ],
)
def test_parse_size(nbdkit: ModuleType, text: str, size: int) -> None:
    assert nbdkit.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "foo", "1.5M", "-1", "1MB", "1 M", "k", "8E", "0x10", str(1 << 63)])
def test_parse_size_of_another_text(nbdkit: ModuleType, text: str) -> None:
    with pytest.raises(ValueError, match="Unable to parse string as size"):
        nbdkit.parse_size(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("0.25", 0.25),
        ("100%", 1),
        ("10%", 0.1),
        ("1:10", 0.1),
        ("1/4", 0.25),
        ("0:0", 0),
        ("1e-3", 0.001),
    ],
)
def test_parse_probability(nbdkit: ModuleType, text: str, value: float) -> None:
    assert nbdkit.parse_probability("p", text) == value


@pytest.mark.parametrize("text", ["bar", "", "-1", "1:0", "nan", "inf", "5%%", "1:2:3"])
def test_parse_probability_of_another_text(nbdkit: ModuleType, text: str) -> None:
    with pytest.raises(ValueError, match="Unable to parse string as probability"):
        nbdkit.parse_probability("p", text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("10ms", (0, 10_000_000)),
        ("1.5", (1, 500_000_000)),
        ("2s", (2, 0)),
        ("3us", (0, 3000)),
        ("3μs", (0, 3000)),
        ("7ns", (0, 7)),
    ],
)
def test_parse_delay(nbdkit: ModuleType, text: str, value: tuple[int, int]) -> None:
    assert nbdkit.parse_delay("d", text) == value


@pytest.mark.parametrize("text", ["bar", "", "-1", "1m", "inf"])
def test_parse_delay_of_another_text(nbdkit: ModuleType, text: str) -> None:
    with pytest.raises(ValueError, match="Unable to parse string as delay"):
        nbdkit.parse_delay("d", text)


def test_texts_must_be_strings(nbdkit: ModuleType) -> None:
    calls: list[Callable[[], object]] = [
        lambda: nbdkit.parse_size(17),
        lambda: nbdkit.parse_probability("p", 17),
        lambda: nbdkit.parse_delay("d", 17),
        lambda: nbdkit.read_password(b"x"),
        lambda: nbdkit.debug(17),
        lambda: nbdkit.set_error("EIO"),
        lambda: nbdkit.set_error(1.5),
    ]
    for call in calls:
        with pytest.raises(TypeError):
            call()


def test_read_password(nbdkit: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "password").write_bytes(b"from a file\nsecond line\n")
    assert nbdkit.read_password("itself") == b"itself"
    assert nbdkit.read_password(f"+{tmp_path / 'password'}") == b"from a file"
    descriptor = os.open(tmp_path / "password", os.O_RDONLY)
    assert nbdkit.read_password(f"-{descriptor}") == b"from a file"
    monkeypatch.setattr("getpass.getpass", lambda prompt: "typed")
    assert nbdkit.read_password("-") == b"typed"


@pytest.mark.parametrize("value", ["+/no/such/file", "-0", "-2", "-x"])
def test_a_password_that_cannot_be_read(nbdkit: ModuleType, value: str) -> None:
    with pytest.raises(ValueError, match="Unable to parse parameter as a password"):
        nbdkit.read_password(value)


def test_there_is_one_client_without_export_tls_and_peer(nbdkit: ModuleType) -> None:
    assert (nbdkit.export_name(), nbdkit.is_tls(), nbdkit.stdio_safe()) == ("", False, True)
    for peer in ("pid", "uid", "gid", "security_context", "tls_dn", "tls_issuer_dn"):
        with pytest.raises(ValueError, match="Unable to get"):
            getattr(nbdkit, f"peer_{peer}")()


def test_shutdown_and_disconnect_end_the_backend(nbdkit: ModuleType, ended: list[str]) -> None:
    nbdkit.shutdown()
    nbdkit.disconnect(True)
    assert ended == ["nbdkit.shutdown()", "nbdkit.disconnect()"]


def test_nanosleep_sleeps(nbdkit: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    nbdkit.nanosleep(1, 500_000_000)
    assert slept == [1.5]


def test_set_error_belongs_to_the_thread_that_calls_it(ended: list[str]) -> None:
    api = Api(ended.append)
    api.set_error(5)
    other: list[int] = []
    thread = threading.Thread(target=lambda: other.append(api.take_error()))
    thread.start()
    thread.join()
    assert other == [0] and api.take_error() == 5 and api.take_error() == 0


def test_debug_is_a_line_of_the_log(plugin: Plugin, caplog: pytest.LogCaptureFixture) -> None:
    backend = plugin(NEEDED, "nbdkit.debug('loaded %s')\n")
    opened(backend)
    with caplog.at_level("DEBUG", logger="ublkpool"):
        sys.modules["nbdkit"].debug("100%s of it")
    assert "100%s of it" in caplog.text
