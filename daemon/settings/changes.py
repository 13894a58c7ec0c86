"""Which of a device's settings can change while it serves, and the config that a change makes.

Owns that decision for every field of `DeviceConfig` (docs/OPERATIONS.md has it as a table, which a test compares with
`APPLIES`).  A changed config passes the same checks as one from a file.  Must not know a running device.
"""

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from ublkpool.daemon.errors import ConfigError
from ublkpool.daemon.settings.config import (
    USER_KEYS,
    BackendConfig,
    Conflict,
    DeviceConfig,
    Problem,
    check_fields,
    option_text,
)

Applies = Literal["now", "at the backend's next start", "to a new device"]
Scalar = bool | int | float | str
WHILE_LIVE = (
    "io_timeout_s",
    "on_timeout",
    "absent_timeout_s",
    "on_absent",
    "iops_max",
    "bytes_per_s_max",
    "burst_s",
)
"""The fields that a device takes while it serves."""
_BACKEND = "backend."
_DEFAULT = "-"


def user_key(field: str) -> str:
    """The user's key for this field of `DeviceConfig`."""
    return USER_KEYS.get(field, field)


def _applies(field: str) -> Applies:
    if field == "backend":
        return "at the backend's next start"
    return "now" if field in WHILE_LIVE else "to a new device"


APPLIES: dict[str, Applies] = {
    user_key(field): _applies(field) for field in DeviceConfig.__struct_fields__ if field != "name"
}
"""When a changed value takes effect, by the user's key.

What the driver, the pool or the backend was given when the device was made stays as it is for the device's life.  Of
`backend` only options, layers and interpreter can change, not its kind.
"""


def changed(config: DeviceConfig, values: Mapping[str, Scalar]) -> DeviceConfig:
    """The config with these values, by the user's keys; one that begins with `backend.` is an option of the
    daemon's own backend.

    Raises `ConfigError` with a line for each mistake, also for a key that cannot change.
    """
    problems: list[Problem] = []
    own = {key: value for key, value in values.items() if not key.startswith(_BACKEND)}
    fixed = [key for key in own if APPLIES.get(key, "now") != "now" or key == "name"]
    problems += [Problem((key,), _why_fixed(key)) for key in fixed]
    fields = check_fields(
        {key: value for key, value in own.items() if key not in fixed},
        DeviceConfig,
        (),
        problems,
        required=False,
    )
    options = {key.removeprefix(_BACKEND): value for key, value in values.items() if key.startswith(_BACKEND)}
    if options:
        fields["backend"] = _with_options(config.backend, options, problems)
    if problems:
        raise ConfigError([f"{'.'.join(map(str, path))}: {message}" for path, message in problems])
    try:
        return msgspec.structs.replace(config, **fields)
    except Conflict as conflict:
        raise ConfigError([f"{conflict.key}: {conflict}"]) from conflict


def _why_fixed(key: str) -> str:
    if key == "backend":
        return "write backend.KEY=VALUE, for an option of the backend that the daemon runs"
    if key == "size":
        return "a live device grows with: ublkpool resize NAME SIZE"
    return "is fixed when the device is made: del the device, then add it with the new value"


def _with_options(
    backend: BackendConfig | None, options: Mapping[str, Scalar], problems: list[Problem]
) -> BackendConfig | None:
    """The backend with these options; adds a problem if the daemon runs none, or for a key that is no option."""
    if backend is None:
        problems.append(
            Problem(
                (f"{_BACKEND}{next(iter(options))}",),
                "the daemon runs no backend for this device: give the option to the command that starts it",
            )
        )
        return None
    for key in ("kind", "layers", "python", "user", "group", "cwd", ""):
        if key in options:
            problems.append(Problem((f"{_BACKEND}{key}",), "is no option of a backend"))
    texts = {key: option_text(value) or "" for key, value in options.items()}
    return msgspec.structs.replace(backend, options={**backend.options, **texts})


def wanted_now(config: DeviceConfig, wanted: DeviceConfig) -> DeviceConfig:
    """`config` with every value of `wanted` that can change while the device serves."""
    fields: dict[str, Any] = {field: getattr(wanted, field) for field in WHILE_LIVE}
    if _may_replace(config.backend, wanted.backend):
        fields["backend"] = wanted.backend
    return msgspec.structs.replace(config, **fields)


def _may_replace(one: BackendConfig | None, other: BackendConfig | None) -> bool:
    return one is not None and other is not None and one.kind == other.kind


def differences(config: DeviceConfig, other: DeviceConfig) -> list[str]:
    """The user's keys whose values differ."""
    return [
        user_key(field)
        for field in DeviceConfig.__struct_fields__
        if getattr(config, field) != getattr(other, field)
    ]


def shown(config: DeviceConfig, key: str) -> str:
    """The value of this key in words; `-` if the device has none of its own."""
    field = next(each for each in DeviceConfig.__struct_fields__ if user_key(each) == key)
    value = getattr(config, field)
    if value is None:
        return _DEFAULT
    if isinstance(value, BackendConfig):
        layers = [f"layer={each}" for each in value.layers]
        options = [f"{name}={text}" for name, text in value.options.items()]
        return " ".join((value.kind, *options, *layers))
    return f"{value:g}" if isinstance(value, float) else option_text(value) or ""
