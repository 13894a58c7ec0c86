"""The config file: from TOML text to `ServeConfig`, every mistake with its file, line and key.

Owns the file's outline (`[daemon]`, `[[device]]`) and what must be unique in it.  Relative paths in a config
file are meant from the file's own directory.
"""

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ublkpool.bufpool.way_out import too_long_for_sockets
from ublkpool.daemon.errors import ConfigError
from ublkpool.daemon.settings.config import (
    RUN_DIR_DEFAULT,
    DaemonTable,
    DeviceConfig,
    KeyPath,
    Problem,
    ServeConfig,
    check_device,
    check_fields,
)
from ublkpool.daemon.settings.toml_lines import KeyLines

_TOML_POSITION = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)$")


def load_config(file: Path, run_dir: Path | None = None) -> ServeConfig:
    """The config in this file; `run_dir` wins over the file's.  Raises `ConfigError` with all mistakes."""
    text = _read(file)
    document = _parse(text, file)
    problems: list[Problem] = []
    daemon = _check_daemon(document.get("daemon", {}), problems)
    devices = _check_devices(document.get("device", []), problems, file.absolute().parent)
    problems.extend(
        Problem((key,), "unknown table; known: [daemon], [[device]]")
        for key in document
        if key not in ("daemon", "device")
    )
    if problems:
        raise ConfigError(_located(problems, text, file))
    return ServeConfig(
        run_dir=(run_dir or Path(daemon.run_dir or RUN_DIR_DEFAULT)).absolute(),
        group=daemon.group,
        log_level=daemon.log_level,
        log_format=daemon.log_format,
        on_stop=daemon.on_stop,
        state_dir=Path(daemon.state_dir) if daemon.state_dir else None,
        devices=tuple(devices),
    )


def render_path(path: KeyPath) -> str:
    """`device[0].queues`."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".")


def _located(problems: list[Problem], text: str, file: Path) -> list[str]:
    lines = KeyLines(text)
    placed = sorted((lines.line_of(path), render_path(path), message) for path, message in problems)
    return [f"{file}:{line}: {key}: {message}" for line, key, message in placed]


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError([f"{file}: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError([f"{file}:{line}: not UTF-8: byte 0x{error.object[error.start]:02x}"]) from error


def _parse(text: str, file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        position = _TOML_POSITION.search(str(error))
        line = int(position[1]) if position and position[1] else len(text.splitlines())
        reason = _TOML_POSITION.sub("", str(error))
        raise ConfigError([f"{file}:{line}: not TOML: {reason}"]) from error


def _check_daemon(table: object, problems: list[Problem]) -> DaemonTable:
    if not isinstance(table, Mapping):
        problems.append(Problem(("daemon",), "expected a table: write [daemon]"))
        return DaemonTable()
    daemon = DaemonTable(**check_fields(table, DaemonTable, ("daemon",), problems))
    for key, value in (("run_dir", daemon.run_dir), ("state_dir", daemon.state_dir)):
        if value is not None and not Path(value).is_absolute():
            problems.append(Problem(("daemon", key), f"expected an absolute path, got {value!r}"))
    if daemon.run_dir is not None and (reason := too_long_for_sockets(Path(daemon.run_dir))):
        problems.append(Problem(("daemon", "run_dir"), reason))
    if daemon.group is not None and not _group_exists(daemon.group):
        problem = f"no such group: {daemon.group}; create it with: groupadd --system {daemon.group}"
        problems.append(Problem(("daemon", "group"), problem))
    return daemon


def _group_exists(name: str) -> bool:
    import grp

    try:
        grp.getgrnam(name)
    except KeyError:
        return False
    return True


def _check_devices(tables: object, problems: list[Problem], cwd: Path) -> list[DeviceConfig]:
    if not isinstance(tables, list) or not all(isinstance(table, Mapping) for table in tables):
        problems.append(
            Problem(("device",), "expected an array of tables: write [[device]], with two brackets")
        )
        return []
    for key in ("name", "id"):
        _check_unique(tables, key, problems)
    checked = [check_device(table, ("device", index), problems, cwd) for index, table in enumerate(tables)]
    return [device for device in checked if device is not None]


def _check_unique(tables: list[Mapping[str, object]], key: str, problems: list[Problem]) -> None:
    first: dict[object, int] = {}
    for index, table in enumerate(tables):
        value = table.get(key)
        if not isinstance(value, str | int):
            continue
        if value in first:
            problem = f"{value!r} is already taken by device[{first[value]}]; choose another"
            problems.append(Problem(("device", index, key), problem))
        first.setdefault(value, index)
