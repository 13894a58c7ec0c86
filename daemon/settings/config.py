"""The configuration's types, their limits, and the errors for values that break them.

Owns `DeviceConfig`, `BackendConfig` and `ServeConfig`, which the rest of the daemon works with, and the check that
turns a table of user-written keys (from TOML or the command line) into them.  Must not know files or options: a problem
is a key path and a text.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import msgspec
from msgspec import Meta

from ublkpool import RUN_DIR_DEFAULT
from ublkpool.bufpool.errors import PoolError
from ublkpool.daemon.settings.affinity import parse_cpus
from ublkpool.daemon.settings.listen import ListenAddress

KeyPath = tuple[str | int, ...]
"""Path of a key in the TOML document: `("device", 0, "queues")`."""

CLIENT_SLICES = 8
"""Number of slices of a client area; each client has one."""

KIB = 1024
MIB = 1024 * KIB
DEVICE_BYTES_MAX = 2**63 - 512

DeviceName = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}\Z",
        extra={"expected": "1 to 64 letters, digits, '_', '.' or '-', not starting with '.' or '-'"},
    ),
]
DeviceBytes = Annotated[int, Meta(ge=512, le=DEVICE_BYTES_MAX, multiple_of=512)]
QueueCount = Annotated[int, Meta(ge=1, le=4096)]
Depth = Annotated[int, Meta(ge=1, le=4096)]
DeviceId = Annotated[int, Meta(ge=0, le=2**20 - 1)]
IoBytes = Annotated[int, Meta(ge=4 * KIB, le=32 * MIB, multiple_of=4 * KIB)]
ClientBytes = Annotated[int, Meta(ge=0, le=CLIENT_SLICES << 32, multiple_of=CLIENT_SLICES * 4 * KIB)]
MemoryBytes = Annotated[int, Meta(ge=0, le=1 << 62)]
PoolBytes = Annotated[int, Meta(ge=4 * KIB, multiple_of=4 * KIB)]
Seconds = Annotated[float, Meta(gt=0, le=86400)]
SECONDS_MIN = 0.001
"""Deadlines are kept in milliseconds, and 0 is none."""
IopsMax = Annotated[int, Meta(ge=0, le=10**8)]
BytesPerSecond = Annotated[int, Meta(ge=0, le=1 << 40)]
LIMITED_BYTES_MIN = 64 * KIB
"""The smallest limit in bytes a second: below it a request of ordinary size would wait for minutes."""
BurstSeconds = Annotated[float, Meta(ge=0.01, le=3600)]
SpinUs = Annotated[int, Meta(ge=0, le=1000)]
PreparedCount = Annotated[int, Meta(ge=0, le=1024)]
EventBytes = Annotated[int, Meta(ge=64 * KIB, le=64 * MIB)]
EVENT_BYTES_DEFAULT = MIB
Placement = Literal["pool", "backend"]
Answers = Literal["backend", "worker"]
Isolation = Literal["process", "none"]
Affinity = Annotated[
    str,
    Meta(
        pattern=r"^(auto|off|\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*)\Z",
        extra={"expected": "auto, off or CPUs as in '0-3,8'"},
    ),
]
HugePages = Literal["auto", "off", "require"]
Recovery = Literal["reissue", "abort", "fail", "none"]
OnTimeout = Literal["wait", "fail"]
OnStop = Literal["delete", "leave"]
OnAbsent = Literal["wait", "fail"]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["auto", "human", "logfmt", "json"]


WITHOUT_LISTS = ("file", "memory", "null")
"""Backends none of whose options may be given several times; others judge that themselves."""
INSIDE_KINDS = ("null", "memory", "file", "cow", "rbd")
"""Backends whose native engine a device's workers can run themselves."""
ONE_QUEUE_KINDS = ("cow", "rbd")
"""Those of them whose store only one engine at a time can serve."""
CONNECTED_KINDS = ("rbd",)
"""Those of them whose store is a connection: the worker makes it, and has the store's lock."""


class Conflict(ValueError):
    """Two settings that contradict each other; `key` is the one that the error names."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


class BackendConfig(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """A backend that the daemon runs: a built-in kind or the absolute path of a .py file.

    `cwd` is the config file's directory, or the directory in which the user ran `ublkpool add`; relative paths in
    options start there.
    """

    kind: Annotated[str, Meta(min_length=1)]
    options: Mapping[str, str | list[str]] = {}
    """A list for a key that is given several times."""
    cwd: str | None = None
    python: str | None = None
    """The interpreter that runs it, of an environment that has ublkpool, too; None for the daemon's own."""
    user: str | None = None
    """The user, by name or number, as which it runs; None for the daemon's."""
    group: str | None = None
    """The group, by name or number, in place of the user's first one."""
    layers: tuple[str, ...] = ()
    """Each `NAME:key=value,...`; the first gets each request first."""


class DeviceConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One device.  If fields are None, the kernel chooses `id`, the backend gives the size, others are derived.

    A field at its default is left out of records and requests, so that an earlier version, which refuses fields that it
    does not know, reads those of a device that uses nothing new.  So a default never changes.
    """

    name: DeviceName
    size_bytes: DeviceBytes | None = None
    queues: QueueCount = 1
    depth: Depth = 128
    id: DeviceId | None = None
    max_io_bytes: IoBytes = 512 * KIB
    need_get_data: bool = True
    placement: Placement = "pool"
    answers: Answers = "backend"
    recovery: Recovery = "reissue"
    read_only: bool = False
    partitions: bool = True
    rings: bool = True
    spin_us: SpinUs | None = None
    pool_bytes: PoolBytes | None = None
    huge_pages: HugePages = "auto"
    affinity: Affinity = "auto"
    client_buffers_bytes: ClientBytes = 0
    io_timeout_s: Seconds = 30.0
    on_timeout: OnTimeout = "wait"
    absent_timeout_s: Seconds = 60.0
    on_absent: OnAbsent = "wait"
    iops_max: IopsMax = 0
    bytes_per_s_max: BytesPerSecond = 0
    burst_s: BurstSeconds = 0.1
    backend: BackendConfig | None = None
    isolation: Isolation = "process"
    zero_copy: bool = False

    def __post_init__(self) -> None:
        if self.zero_copy:
            self._check_zero_copy()
        if self.isolation == "none":
            self._check_isolation()
        if self.placement == "backend" and not self.need_get_data:
            raise Conflict(
                "placement", "backend placement needs need_get_data: turn it on, or use placement pool"
            )
        if self.answers == "worker":
            self._check_answers()
        if self.affinity not in ("auto", "off"):
            try:
                parse_cpus(self.affinity)
            except ValueError as error:
                raise Conflict("affinity", str(error)) from error
        if 0 < self.bytes_per_s_max < LIMITED_BYTES_MIN:
            raise Conflict(
                "bytes_per_s_max",
                f"expected at least {LIMITED_BYTES_MIN} bytes a second, or 0 for no limit, got {self.bytes_per_s_max}",
            )
        if self.pool_bytes is not None and self.pool_bytes < self.max_io_bytes:
            raise Conflict(
                "pool", f"expected at least one request's {self.max_io_bytes} bytes, got {self.pool_bytes}"
            )

    @property
    def waits_for_backend(self) -> bool:
        """Whether the disk appears only when a backend that the daemon does not run has attached."""
        return self.backend is None and self.answers == "backend"

    @property
    def has_backend_process(self) -> bool:
        """Whether a process of its own answers the device's requests: this daemon's backend or one that attaches."""
        return self.answers == "backend" and self.isolation == "process"

    @property
    def asks_the_broker(self) -> bool:
        """Whether workers lease their buffers: those of an engine in the workers are the queues' own."""
        return self.isolation == "process"

    @property
    def asks_for_data(self) -> bool:
        """Whether the driver asks where each write's data shall go; with zero copy the data goes nowhere."""
        return self.need_get_data and not self.zero_copy

    def _check_zero_copy(self) -> None:
        """Refuse a device of which no engine in its workers does its I/O on the client's own pages."""
        kind = self.backend.kind if self.backend else "no backend"
        if kind != "file":
            raise Conflict(
                "zero_copy", f"only the backend file does its I/O on the client's pages, not {kind}"
            )
        if self.isolation != "none":
            raise Conflict(
                "zero_copy", "only the device's workers can use the client's pages: set isolation to none"
            )

    def _check_isolation(self) -> None:
        """Refuse settings that need a process, on a device whose workers run the backend's engine themselves."""
        key, backend = "isolation", self.backend
        if backend is None or backend.kind not in INSIDE_KINDS:
            what = (
                "no backend is given"
                if backend is None
                else f"{backend.kind} runs only in a process of its own"
            )
            kinds = ", ".join(INSIDE_KINDS)
            raise Conflict(key, f"none is for the backends {kinds}, and {what}: use isolation process")
        if backend.kind in ONE_QUEUE_KINDS and self.queues != 1:
            raise Conflict(
                "queues",
                f"with isolation none each queue has an engine of its own, and one alone can serve a {backend.kind} "
                "store: use one queue, or isolation process",
            )
        for name in ("user", "group", "python", "layers"):
            if getattr(backend, name):
                raise Conflict(
                    key,
                    f"with none the backend has no process, which its {name} needs: use isolation process",
                )
        if self.placement == "backend" and backend.kind != "memory":
            raise Conflict(
                "placement", f"with isolation none {backend.kind} uses the pool's buffers: use placement pool"
            )
        if not self.need_get_data and backend.kind == "memory":
            raise Conflict(
                "need_get_data", "with isolation none memory names the place of each write: turn it on"
            )
        if self.client_buffers_bytes:
            raise Conflict(
                "client_buffers", "they are shared with a backend's process: use isolation process"
            )
        if self.on_timeout == "fail":
            raise Conflict(
                "on_timeout",
                "with isolation none no process can be ended while its storage hangs: use on_timeout wait",
            )

    def _check_answers(self) -> None:
        """Refuse settings that need a backend, on a device whose workers answer requests themselves."""
        if self.backend is not None:
            raise Conflict(
                "answers", "the workers answer requests, so a backend would get none: remove backend"
            )
        if self.placement == "backend":
            raise Conflict(
                "answers", "the workers answer requests, so no backend places writes: use placement pool"
            )
        if not self.need_get_data:
            raise Conflict("answers", "workers that answer requests need need_get_data: turn it on")
        if self.size_bytes is None:
            raise Conflict("answers", "the workers answer requests, so no backend has a size: set size")
        if self.client_buffers_bytes:
            raise Conflict(
                "answers",
                "the workers answer requests, so no backend can share client buffers: remove client_buffers",
            )


class DaemonTable(msgspec.Struct, frozen=True, kw_only=True):
    """The `[daemon]` table."""

    run_dir: str | None = None
    group: str | None = None
    on_stop: OnStop = "delete"
    log_level: LogLevel = "info"
    log_format: LogFormat = "auto"
    state_dir: str | None = None
    events_bytes: EventBytes = EVENT_BYTES_DEFAULT
    memory_max_bytes: MemoryBytes = 0
    user: str | None = None


class MetricsTable(msgspec.Struct, frozen=True, kw_only=True):
    """The `[metrics]` table; `listen` is checked by `listen.parse_listen`."""

    listen: str


class PrepareTable(msgspec.Struct, frozen=True, kw_only=True):
    """The `[prepare]` table: how many devices are prepared, and their shape, whose defaults are those of a device."""

    count: PreparedCount = 0
    isolation: Isolation = "none"
    queues: QueueCount = 1
    depth: Depth = 128
    max_io_bytes: IoBytes = 512 * KIB
    need_get_data: bool = True
    placement: Placement = "pool"
    recovery: Recovery = "reissue"
    partitions: bool = True
    rings: bool = True
    spin_us: SpinUs | None = None
    pool_bytes: PoolBytes | None = None
    huge_pages: HugePages = "auto"
    affinity: Affinity = "auto"


class Prepare(NamedTuple):
    """The prepared devices that the daemon keeps, see `device/prepared.py`."""

    number: int
    shape: DeviceConfig

    @classmethod
    def of(cls, table: PrepareTable) -> "Prepare":
        """Raises `Conflict`."""
        fields = {each: getattr(table, each) for each in table.__struct_fields__ if each != "count"}
        store = BackendConfig(kind="null")
        return cls(table.count, DeviceConfig(name="prepare", backend=store, **fields))


class ServeConfig(NamedTuple):
    """The configuration of `ublkpool serve`."""

    run_dir: Path = RUN_DIR_DEFAULT
    group: str | None = None
    log_level: LogLevel = "info"
    log_format: LogFormat = "auto"
    devices: tuple[DeviceConfig, ...] = ()
    on_stop: OnStop = "delete"
    replace: bool = False
    state_dir: Path | None = None
    """None: one of the directories of `device.state.candidates`."""
    file: Path | None = None
    """The config file that `devices` and `table` were read from, which a reload reads again."""
    table: DaemonTable = DaemonTable()
    """The file's `[daemon]`, before any option of the command line."""
    events_bytes: int = EVENT_BYTES_DEFAULT
    """The bound of the events in the state directory, and in memory."""
    memory_max_bytes: int = 0
    """What all devices may have together, see `device/memory.py`; 0: no budget."""
    metrics: ListenAddress | None = None
    """Where metrics are served; None: nowhere."""
    metrics_table: MetricsTable | None = None
    """The file's `[metrics]`, before any option of the command line; None: the file has none."""
    user: str | None = None
    """The user that workers and broker become; None: see `settings/worker_account.py`."""
    prepare: Prepare | None = None
    """The devices that are prepared; None: none."""
    prepare_table: PrepareTable = PrepareTable()
    """The file's `[prepare]`, before any option of the command line."""


class Problem(NamedTuple):
    """One mistake in the configuration: the key, and one line with the reason and the way out."""

    path: KeyPath
    message: str


_OWN_KEYS = ("kind", "python", "user", "group", "layers")
"""Keys of a backend's table that are no options of the backend."""
USER_KEYS = {
    "size_bytes": "size",
    "max_io_bytes": "max_io",
    "pool_bytes": "pool",
    "client_buffers_bytes": "client_buffers",
    "events_bytes": "events",
    "memory_max_bytes": "memory_max",
    "io_timeout_s": "io_timeout",
    "absent_timeout_s": "absent_timeout",
    "spin_us": "spin",
    "burst_s": "burst",
}
"""The user's keys for fields whose names end in a unit: `size = "1G"` sets `size_bytes`."""


def check_device(
    table: Mapping[str, object], path: KeyPath, problems: list[Problem], cwd: Path
) -> DeviceConfig | None:
    """The device that this table of user keys describes; None after adding at least one problem."""
    problem_count = len(problems)
    values = check_fields(table, DeviceConfig, path, problems, apart=frozenset({"backend"}))
    if table.get("backend") is not None:
        values["backend"] = _check_backend(table["backend"], (*path, "backend"), problems, cwd)
    if len(problems) > problem_count:
        return None
    try:
        return DeviceConfig(**values)
    except Conflict as conflict:
        problems.append(Problem((*path, conflict.key), str(conflict)))
        return None


def check_fields(
    table: Mapping[str, object],
    shape: type[msgspec.Struct],
    path: KeyPath,
    problems: list[Problem],
    apart: frozenset[str] = frozenset(),
    required: bool = True,
) -> dict[str, Any]:
    """The valid values of `table`, by field name of `shape`; the caller checks the keys in `apart`.

    Unless `required`, no key need be there.
    """
    fields = {USER_KEYS.get(field.name, field.name): field for field in msgspec.structs.fields(shape)}
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in fields:
            problems.append(Problem((*path, key), _unknown_key(key, list(fields))))
        elif key not in apart:
            field = fields[key]
            checked = _check_value(value, field.name, field.type)
            if isinstance(checked, Problem):
                problems.append(Problem((*path, key), checked.message))
            else:
                values[field.name] = checked
    problems.extend(
        Problem((*path, key), "is missing")
        for key, field in fields.items()
        if required and field.required and key not in table
    )
    return values


def _check_value(value: object, field: str, wanted: Any) -> Any:
    """The value converted to its field's type, or a `Problem` without a path."""
    try:
        if field.endswith(("_bytes", "bytes_per_s_max")) and isinstance(value, str):
            value = _parse_size(value)
        return _checked_further(field, msgspec.convert(value, wanted))
    except msgspec.ValidationError as error:
        return Problem((), _complaint(str(error), value, wanted))
    except (ValueError, PoolError) as error:
        return Problem((), str(error))


def _checked_further(field: str, value: Any) -> Any:
    """The value.  Raises `ValueError` for what records of earlier versions may have, and no user may write."""
    if field.endswith("_s") and value < SECONDS_MIN:
        raise ValueError(f"expected at least {SECONDS_MIN} (a millisecond), got {value:g}")
    if isinstance(value, str) and "\0" in value:
        raise ValueError("expected no NUL character")
    return value


def _parse_size(text: str) -> int:
    from ublkpool.bufpool.sizes import parse_size

    return parse_size(text)


def _check_backend(table: object, path: KeyPath, problems: list[Problem], cwd: Path) -> BackendConfig | None:
    if not isinstance(table, Mapping):
        problems.append(Problem(path, 'expected a table with kind = "...", ' + _got(table)))
        return None
    kind = table.get("kind")
    if not isinstance(kind, str) or not kind:
        problem = 'expected a built-in kind or FILE.py, as in kind = "file"'
        problems.append(Problem((*path, "kind"), problem if kind is None else f"{problem}, {_got(kind)}"))
        return None
    texts_of, lists = (option_text, "") if kind in WITHOUT_LISTS else (_option_texts, ", or a list of them")
    options = {key: texts_of(value) for key, value in table.items() if key not in _OWN_KEYS}
    problems.extend(
        Problem((*path, key), f"expected a string, a number or a bool{lists}, {_got(table[key])}")
        for key, text in options.items()
        if text is None
    )
    texts = {key: text for key, text in options.items() if text is not None}
    python = _check_python(table.get("python"), (*path, "python"), problems, cwd)
    layers = _check_layers(table.get("layers", ()), (*path, "layers"), problems)
    user, group = check_user(table, path, problems)
    config = _resolved_backend(kind, texts, path, problems, cwd)
    return msgspec.structs.replace(config, python=python, user=user, group=group, layers=layers)


def check_user(
    table: Mapping[Any, object], path: KeyPath, problems: list[Problem]
) -> tuple[str | None, str | None]:
    """The backend's user and group; adds a problem for one that does not exist, or for a group without a user."""
    user, group = (table.get(key) for key in ("user", "group"))
    for key, value in (("user", user), ("group", group)):
        if value is not None and not (isinstance(value, str) and value):
            problems.append(Problem((*path, key), f"expected a name, or a number in quotes, {_got(value)}"))
            return None, None
    if group is not None and user is None:
        problems.append(Problem((*path, "group"), "is the group of another user: set user as well"))
    if user is not None:
        from ublkpool.workers.privileges import account_of, group_of

        for key, value, find in (("user", user, account_of), ("group", group, group_of)):
            try:
                if value is not None:
                    find(str(value))
            except LookupError as error:
                problems.append(Problem((*path, key), str(error)))
    return (None if user is None else str(user)), (None if group is None else str(group))


def _check_layers(value: object, path: KeyPath, problems: list[Problem]) -> tuple[str, ...]:
    if isinstance(value, list | tuple) and all(isinstance(each, str) and each for each in value):
        return tuple(value)
    problems.append(Problem(path, f'expected a list such as ["log:file=/x", "readonly"], {_got(value)}'))
    return ()


def _check_python(value: object, path: KeyPath, problems: list[Problem], cwd: Path) -> str | None:
    """The absolute path of the interpreter; a name without `/` is looked up in PATH."""
    if value is None:
        return None
    if not isinstance(value, str) or not value:
        problems.append(Problem(path, f"expected the path of a Python interpreter, {_got(value)}"))
        return None
    import shutil

    # Not the file that a link points to: an environment's interpreter is a link to that of the system.
    file = os.path.normpath(cwd / value) if "/" in value else shutil.which(value) or value
    if not os.access(file, os.X_OK) or Path(file).is_dir():
        problems.append(Problem(path, f"no such program: {file}; give the interpreter of an environment"))
    return file


def _resolved_backend(
    kind: str,
    options: Mapping[str, str | list[str]],
    path: KeyPath,
    problems: list[Problem],
    cwd: Path,
) -> BackendConfig:
    """The backend, with the absolute path of its FILE.py; adds a problem if there is no such file."""
    if kind.endswith(".py") or "/" in kind:
        file = Path(os.path.normpath(cwd / kind))
        if not file.is_file():
            problems.append(Problem((*path, "kind"), f"no such file: {file}"))
        kind = str(file)
    return BackendConfig(kind=kind, options=options, cwd=str(cwd))


def _option_texts(value: object) -> str | list[str] | None:
    """The option's text, or those of a list; None if it is neither."""
    if not isinstance(value, list):
        return option_text(value)
    texts = [text for each in value if (text := option_text(each)) is not None]
    return texts if len(texts) == len(value) else None


def option_text(value: object) -> str | None:
    """The text of a backend's option with this value; None if the value is neither a string, a number nor a bool."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, str | int | float) else None


def _unknown_key(key: str, known: list[str]) -> str:
    return f"unknown key{_nearest(key, known)}; known: {', '.join(known)}"


def _nearest(word: str, choices: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(word, choices, n=1)
    return f", did you mean {near[0]}?" if near else ""


def _complaint(error: str, value: object, wanted: Any) -> str:
    """msgspec's error text in the terms of the config file, with the value."""
    choices = [str(choice) for choice in get_args(wanted) if isinstance(choice, str)]
    if choices:
        return f"expected {' or '.join(choices)}, {_got(value)}" + _nearest(str(value), choices)
    if isinstance(value, str):
        for meta in getattr(wanted, "__metadata__", ()):
            if meta.extra is not None:
                return f"expected {meta.extra['expected']}, {_got(value)}"
    text = error.replace("`", "").replace(" | null", "").partition(", got ")[0]
    return f"{text[0].lower()}{text[1:]}, {_got(value)}"


def _got(value: object) -> str:
    is_no_json = isinstance(value, float) and not math.isfinite(value)
    text = str(value) if is_no_json else msgspec.json.encode(value).decode()
    return f"got {text}" if len(text) <= 60 else f"got {text[:57]}..."
