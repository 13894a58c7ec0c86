"""What a client may ask of the daemon, for the blocking client and for that of asyncio.

Owns the request of each call, the type of its answer, and how long a client waits for it; pure.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import msgspec
from msgspec import UNSET

from ublkpool.daemon.admin.wire import (
    AddRequest,
    DaemonRequest,
    DeleteRequest,
    DrainRequest,
    EventsRequest,
    ListRequest,
    RebindRequest,
    ReloadRequest,
    Request,
    ResizeRequest,
    ResumeRequest,
    SetRequest,
    ShutdownRequest,
    StatsRequest,
    StopRequest,
    WaitRequest,
)
from ublkpool.daemon.errors import ConfigError
from ublkpool.daemon.settings.changes import Scalar
from ublkpool.daemon.settings.config import DeviceConfig, Problem, check_device
from ublkpool.daemon.status import DaemonStatus, DeviceStats, DeviceStatus, Reloaded, ResizeResult, Setting

CONNECT_TIMEOUT_S = 10.0
QUERY_TIMEOUT_S = 30.0
"""For what the daemon answers at once."""
RECONNECT_S = 0.5
RUN_DIR_VARIABLE = "UBLKPOOL_RUN_DIR"
_T = TypeVar("_T")


class Call(msgspec.Struct, Generic[_T], frozen=True):
    """A request, the type of its answer, and whether the daemon answers at once."""

    request: Request
    result: type[_T] | None
    is_prompt: bool = False
    asked_s: float | None = None
    """How long the daemon itself was asked to wait."""

    def patience_s(self, timeout_s: float | None, query_s: float) -> float | None:
        """Seconds until the client gives up: those that its caller gave, else `query_s` for a prompt answer."""
        if timeout_s is not None:
            return timeout_s
        if self.asked_s is not None:
            # Of the two the daemon's error says more.
            return self.asked_s + query_s
        return query_s if self.is_prompt else None


def directory(run_dir: str | os.PathLike[str] | None) -> Path:
    """The run directory; None: that of $UBLKPOOL_RUN_DIR, else the usual one."""
    named = run_dir if run_dir is not None else os.environ.get(RUN_DIR_VARIABLE)
    if named:
        return Path(named).absolute()
    # Imported here because it takes time, and every command names its directory.
    from ublkpool.daemon.settings.user_directories import usual_run_dir

    return usual_run_dir()


def device_config(table: Mapping[str, object], cwd: str | os.PathLike[str] | None = None) -> DeviceConfig:
    """The device that a table with the config file's keys describes, `{"name": "vol0", "size": "1G", ...}`.

    Relative paths of its backend begin in `cwd`, None: the current directory.  Raises `ConfigError` with a line for
    each mistake.
    """
    problems: list[Problem] = []
    device = check_device(table, (), problems, Path.cwd() if cwd is None else Path(cwd).absolute())
    if device is None:
        raise ConfigError([f"{'.'.join(map(str, path))}: {message}" for path, message in problems])
    return device


def _checked(device: DeviceConfig | Mapping[str, object]) -> DeviceConfig:
    """Raises `ConfigError`: a request that the daemon does not understand shall be one of another version."""
    if not isinstance(device, DeviceConfig):
        return device_config(device)
    try:
        return msgspec.convert(msgspec.to_builtins(device), DeviceConfig)
    except msgspec.ValidationError as error:
        raise ConfigError([str(error)]) from error


def _listed(names: str | Sequence[str] | None) -> list[str] | None:
    if names is None:
        return None
    return [names] if isinstance(names, str) else list(names)


def add(device: DeviceConfig | Mapping[str, object], take_over: bool) -> Call[DeviceStatus]:
    return Call(AddRequest(device=_checked(device), take_over=take_over or UNSET), DeviceStatus)


def delete(names: str | Sequence[str] | None, force: bool, keeps_stores: bool) -> Call[list[str]]:
    return Call(
        DeleteRequest(names=_listed(names), force=force, keeps_stores=keeps_stores or UNSET), list[str]
    )


def wait_live(name: str, timeout_s: float | None) -> Call[DeviceStatus]:
    return Call(WaitRequest(name=name, timeout_s=timeout_s), DeviceStatus, asked_s=timeout_s)


def rebind(name: str) -> Call[None]:
    return Call(RebindRequest(name=name), None, is_prompt=True)


def set_values(name: str, values: Mapping[str, Scalar]) -> Call[list[Setting]]:
    return Call(SetRequest(name=name, values=dict(values)), list[Setting])


def drain(name: str, flush: bool, timeout_s: float | None) -> Call[None]:
    return Call(DrainRequest(name=name, flush=flush, timeout_s=timeout_s), None, asked_s=timeout_s)


def resume(name: str) -> Call[None]:
    return Call(ResumeRequest(name=name), None)


def reload() -> Call[list[Reloaded]]:
    return Call(ReloadRequest(), list[Reloaded])


def resize(name: str, size_bytes: int, is_relative: bool) -> Call[ResizeResult]:
    return Call(ResizeRequest(name=name, size_bytes=size_bytes, is_relative=is_relative), ResizeResult)


def devices() -> Call[list[DeviceStatus]]:
    return Call(ListRequest(), list[DeviceStatus], is_prompt=True)


def stats(name: str | None) -> Call[list[DeviceStats]]:
    return Call(StatsRequest(name=name), list[DeviceStats], is_prompt=True)


def daemon() -> Call[DaemonStatus]:
    return Call(DaemonRequest(), DaemonStatus, is_prompt=True)


def stop(leave: bool) -> Call[None]:
    return Call(StopRequest(leave=leave), None, is_prompt=True)


def shut_down(final: bool) -> Call[None]:
    return Call(ShutdownRequest(final=final), None, is_prompt=True)


def events(after: int, names: str | Sequence[str] | None, since: str, follow: bool) -> EventsRequest:
    return EventsRequest(after=after, names=_listed(names), since=since, follow=follow)
