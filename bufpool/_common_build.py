"""What both native modules are built with: warnings, and which liburing.  Their build scripts run this at build time.

`LIBRARIES` is the static liburing if the compiler finds one (Debian's liburing-dev has it): then the modules need
nothing but the C library where they are installed.  `UBLKPOOL_LIBURING=shared` asks for the shared one.

`UBLKPOOL_CHECKED=1`, as `make setup` sets it, makes every warning an error.  Users build without it: a compiler that
knows a new warning must not break their installation.
"""

import os
import shlex
import subprocess
import sysconfig
from pathlib import Path

_STATIC = "liburing.a"


def _has_static() -> bool:
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    command = [*compiler, f"-print-file-name={_STATIC}"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    # A compiler that does not find the file prints its name alone.
    return Path(found).is_absolute()


def _libraries() -> list[str]:
    is_shared = os.environ.get("UBLKPOOL_LIBURING") == "shared"
    return ["uring"] if is_shared or not _has_static() else [f":{_STATIC}"]


LIBRARIES = _libraries()
WARNINGS = [
    *("-Wall", "-Wextra", "-Wno-unused-parameter"),
    # An error for the compiler of Debian 13, so an error everywhere.
    "-Werror=implicit-function-declaration",
    *(["-Werror"] if os.environ.get("UBLKPOOL_CHECKED") == "1" else []),
]
