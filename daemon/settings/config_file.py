"""The config file: from TOML text to `ServeConfig`, each mistake reported with its file and key.

Owns the file's outline (`[daemon]`, `[[device]]`) and the check that names and ids are unique.  Relative paths in a
config file start at the file's own directory.
"""

import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ublkpool.bufpool.way_out import too_long_for_sockets
from ublkpool.daemon.errors import ConfigError
from ublkpool.daemon.settings.config import (
    Conflict,
    DaemonTable,
    DeviceConfig,
    DeviceName,
    KeyPath,
    MetricsTable,
    Prepare,
    PrepareTable,
    Problem,
    ServeConfig,
    check_device,
    check_fields,
)
from ublkpool.daemon.settings.listen import ListenAddress, parse_listen
from ublkpool.daemon.settings.user_directories import usual_run_dir


class _Named(msgspec.Struct):
    name: DeviceName


_TOML_POSITION = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)$")


def load_config(file: Path, run_dir: Path | None = None) -> ServeConfig:
    """The config in this file; `run_dir` overrides the file's.  Raises `ConfigError` with one line per mistake."""
    document = _parse(_read(file), file)
    problems = [
        Problem((key,), "unknown table; known: [daemon], [prepare], [metrics], [[device]]")
        for key in document
        if key not in ("daemon", "prepare", "metrics", "device")
    ]
    daemon = _check_daemon(document.get("daemon", {}), problems)
    run_dir = (run_dir or Path(daemon.run_dir or usual_run_dir(serves=True))).absolute()
    metrics = _check_metrics(document.get("metrics"), problems)
    address = _check_listen(metrics, problems, run_dir)
    prepare_table, prepare = _check_prepare(document.get("prepare", {}), problems)
    devices = _check_devices(document.get("device", []), problems, file.absolute().parent)
    if daemon.group is None and devices:
        problems.extend(_without_group(devices, document["device"]))
    if problems:
        titles = _device_titles(document.get("device"))
        raise ConfigError([f"{file}: {_shown(path, titles)}: {message}" for path, message in problems])
    return ServeConfig(
        run_dir=run_dir,
        group=daemon.group,
        log_level=daemon.log_level,
        log_format=daemon.log_format,
        on_stop=daemon.on_stop,
        state_dir=Path(daemon.state_dir) if daemon.state_dir else None,
        events_bytes=daemon.events_bytes,
        memory_max_bytes=daemon.memory_max_bytes,
        devices=tuple(devices),
        file=file.absolute(),
        table=daemon,
        metrics_table=metrics,
        metrics=address,
        user=daemon.user,
        prepare=prepare,
        prepare_table=prepare_table,
    )


def _device_titles(tables: object) -> list[str]:
    """Each device's name in errors: `device "vol0"`, or `device[0]` if the name is missing, invalid or not unique."""
    if not isinstance(tables, list):
        return []
    names = [_valid_name(table) for table in tables]
    count = Counter(names)
    return [
        f'device "{name}"' if name and count[name] == 1 else f"device[{index}]"
        for index, name in enumerate(names)
    ]


def _valid_name(table: object) -> str | None:
    try:
        return msgspec.convert(table, _Named).name
    except msgspec.ValidationError:
        return None


def _shown(path: KeyPath, titles: list[str]) -> str:
    """A key's path for the user: `device "vol0": backend.path`, `device[0].name`, `daemon.group`."""
    match path:
        case ("device", int(index), *keys):
            title, rest = titles[index], ".".join(map(str, keys))
            return f"{title}.{rest}" if title.endswith("]") else f"{title}: {rest}"
        case _:
            return ".".join(map(str, path))


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
    if daemon.user is not None and (problem := _why_no_user(daemon.user)):
        problems.append(Problem(("daemon", "user"), problem))
    return daemon


def _check_prepare(table: object, problems: list[Problem]) -> tuple[PrepareTable, Prepare | None]:
    if not isinstance(table, Mapping):
        problems.append(Problem(("prepare",), "expected a table: write [prepare]"))
        return PrepareTable(), None
    problem_count = len(problems)
    values = check_fields(table, PrepareTable, ("prepare",), problems)
    if len(problems) > problem_count:
        return PrepareTable(), None
    checked = PrepareTable(**values)
    try:
        return checked, Prepare.of(checked) if checked.count else None
    except Conflict as conflict:
        problems.append(Problem(("prepare", conflict.key), str(conflict)))
        return checked, None


def _check_metrics(table: object, problems: list[Problem]) -> MetricsTable | None:
    if table is None:
        return None
    if not isinstance(table, Mapping):
        problems.append(Problem(("metrics",), "expected a table: write [metrics]"))
        return None
    values = check_fields(table, MetricsTable, ("metrics",), problems)
    return MetricsTable(**values) if "listen" in values else None


def _check_listen(
    metrics: MetricsTable | None, problems: list[Problem], run_dir: Path
) -> ListenAddress | None:
    if metrics is None:
        return None
    try:
        return parse_listen(metrics.listen, run_dir)
    except ValueError as error:
        problems.append(Problem(("metrics", "listen"), str(error)))
        return None


def _group_exists(name: str) -> bool:
    import grp

    try:
        grp.getgrnam(name)
    except KeyError:
        return False
    return True


def _why_no_user(name: str) -> str:
    from ublkpool.workers.privileges import account_of

    try:
        account_of(name)
    except LookupError as error:
        return str(error)
    return ""


def _without_group(devices: Sequence[DeviceConfig], tables: Sequence[object]) -> Iterator[Problem]:
    """A problem for each backend that is to run as another user, whom the daemon's sockets would not let in."""
    users = {device.name for device in devices if device.backend is not None and device.backend.user}
    for index, table in enumerate(tables):
        if _valid_name(table) in users:
            yield Problem(
                ("device", index, "backend", "user"), "needs group in [daemon]: by it the backend gets in"
            )


def _check_devices(tables: object, problems: list[Problem], cwd: Path) -> list[DeviceConfig]:
    if not isinstance(tables, list) or not all(isinstance(table, Mapping) for table in tables):
        problems.append(
            Problem(("device",), "expected an array of tables: write [[device]], with two brackets")
        )
        return []
    checked = [check_device(table, ("device", index), problems, cwd) for index, table in enumerate(tables)]
    for key in ("name", "id"):
        _check_unique(tables, key, problems)
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
