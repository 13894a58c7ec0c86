"""A daemon of an ordinary user, and what runs as that user beside it.

The guest has no udev: `node_owners.py` stands in for it.  The interpreter may lie in a directory that no other user may
enter, such as root's home: then the user's processes have a mount namespace in which that directory has nothing else.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from support.vm.daemon import DEADLINE_S, MARK, Daemon
from support.vm.warm_starts import Started
from ublkpool.ublk.abi import CONTROL_PATH

USER = 1234
_AS_USER = """
if [ -n "$1" ]; then
    mkdir -p /run/opened
    mount --bind "$2" /run/opened && mount -t tmpfs -o mode=0755 tmpfs "$1" && mkdir -p "$2" &&
        mount --move /run/opened "$2" || exit 1
fi
shift 2
exec setpriv --reuid=USER --regid=USER --clear-groups --inh-caps=-all -- "$@"
""".replace("USER", str(USER))


class UserDaemon(Daemon):
    """`ublkpool serve` of an ordinary user, without any option; with `as_root_of_namespace` in a user namespace."""

    def __init__(self, as_root_of_namespace: bool = False) -> None:
        super().__init__()
        self._enters = ["unshare", "-Ur"] if as_root_of_namespace else []
        self.home = self.path("home")
        self.runtime = self.path("runtime")
        self.run_dir = self.runtime / "ublkpool"
        self.client = type(self.client)(self.run_dir)
        for each in (self.home, self.runtime):
            each.mkdir(mode=0o700)
        for each in (self._scratch, self.home, self.runtime):
            os.chown(each, USER, USER)
        self._owners: subprocess.Popen[bytes] | None = None

    def addressed(self, arguments: Sequence[str]) -> list[str]:
        return list(arguments)

    def _serve(self, *options: str) -> list[str]:
        return ["serve", *options]

    def environment(self) -> dict[str, str]:
        environment = {**super().environment(), "HOME": str(self.home), "XDG_RUNTIME_DIR": str(self.runtime)}
        for name in ("UBLKPOOL_STATE_DIR", "UBLKPOOL_RUN_DIR", "XDG_STATE_HOME"):
            environment.pop(name, None)
        return environment

    def as_user(self, command: Sequence[str]) -> list[str]:
        """The command as the user."""
        closed = next((each for each in _parents(Path(sys.base_prefix)) if not each.stat().st_mode & 1), "")
        return [
            "unshare",
            "-m",
            "sh",
            "-c",
            _AS_USER,
            "sh",
            str(closed),
            sys.base_prefix,
            *self._enters,
            *command,
        ]

    def command(self, *arguments: str) -> list[str]:
        return self.as_user(super().command(*arguments))

    def start(self, warm: bool = True) -> None:
        """Have udev's part done, too."""
        if self._owners is None:
            # Not of the daemon's processes.
            environment = {key: value for key, value in self.environment().items() if key != MARK}
            helper = [sys.executable, "-m", "support.vm.node_owners", str(USER)]
            self._owners = subprocess.Popen(helper, env=environment)
        super().start(warm)

    def _spawn(self, command: Sequence[str], log: Path, warm: bool = True) -> Started:
        return super()._spawn(self.as_user(command), log, warm)

    def run(self, *command: str) -> "subprocess.CompletedProcess[str]":
        """Run a command as the user."""
        return subprocess.run(
            self.as_user(command),
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            env=self.environment(),
            check=False,
        )

    def close(self) -> None:
        if self._owners is not None:
            self._owners.terminate()
            self._owners.wait(DEADLINE_S)
            os.chown(CONTROL_PATH, 0, 0)
            Path(CONTROL_PATH).chmod(0o600)
        super().close()
        shutil.rmtree(self._scratch, ignore_errors=True)


def _parents(path: Path) -> list[Path]:
    return [*reversed(path.parents), path]
