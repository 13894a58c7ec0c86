"""Answers the calls of the program `kublk` without a start of Python each, which takes seconds in a guest.

A selftest calls `kublk` dozens of times.  There `kublk` is a shell script (`CALL`), which sends its process number,
directory and arguments through the pipe `asked`, and ends with the status that it reads from the pipe `answer.NUMBER`.
The server (`python -m support.vm.kublk_server`) forks for each call; the child takes the script's standard output and
error, and does what `kublk_shim.py` does.  Both pipes are in KUBLK_STATE, which the script and the server have in their
environment with all that `kublk_shim.py` wants there.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from support.vm import kublk_shim

# A line that is no longer than PIPE_BUF goes into the pipe as a whole.  While `echo` runs, the shell's descriptor 1 is
# the pipe: so the script keeps its real output and error as 3 and 4, which the server opens.
CALL = r"""#!/bin/sh
exec 3>&1 4>&2
IFS=$(printf '\037')
answer=$KUBLK_STATE/answer.$$
mkfifo "$answer"
echo "$$$IFS$PWD$IFS$*" > "$KUBLK_STATE/asked"
read -r status < "$answer"
rm "$answer"
exit "$status"
"""
_BETWEEN = "\x1f"
_GROUP = "SERVER"
_READY = b"ready\n"


@contextmanager
def answered(program: Path, environment: Mapping[str, str]) -> Iterator[None]:
    """Write the script to `program`, and answer its calls until the end of the block."""
    program.write_text(CALL)
    program.chmod(0o755)
    os.mkfifo(_calls(environment))
    # Pytest finds this module by its own setting, and a guest's environment has no PYTHONPATH.
    found = {**environment, "PYTHONPATH": str(Path(__file__).parents[2])}
    quiet = subprocess.DEVNULL
    with subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=quiet,
        stdout=subprocess.PIPE,
        env=found,
        start_new_session=True,
    ) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == _READY, "the server of kublk's calls has not started"
            Path(environment["KUBLK_STATE"], _GROUP).write_text(str(server.pid))
            yield
        finally:
            os.killpg(server.pid, signal.SIGKILL)


def cut_off(state: Path) -> None:
    """End the server and every call that it answers, also one that hangs."""
    os.killpg(int((state / _GROUP).read_text()), signal.SIGKILL)


def _calls(environment: Mapping[str, str]) -> Path:
    return Path(environment["KUBLK_STATE"], "asked")


def _serve() -> None:
    """Answer calls until this process is killed."""
    os.write(1, _READY)
    # Nothing asks how a child has ended.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    # With a writing end of its own it does not come to the pipe's end between two calls.
    with os.fdopen(os.open(_calls(os.environ), os.O_RDWR | os.O_CLOEXEC), "rb") as calls:
        for line in calls:
            caller, directory, *words = line.decode().removesuffix("\n").split(_BETWEEN)
            if os.fork() == 0:
                _answer(int(caller), directory, words)


def _answer(caller: int, directory: str, words: list[str]) -> NoReturn:
    """Do what a call asks for; its status is 1 if that raises."""
    status = 1
    try:
        # A backend that it starts would inherit that the signal is ignored.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.chdir(directory)
        for theirs, ours in ((3, 1), (4, 2)):
            os.dup2(os.open(f"/proc/{caller}/fd/{theirs}", os.O_WRONLY | os.O_APPEND), ours)
        status = kublk_shim.main(words)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        # A reader of what the caller prints sees its end only when these are closed, too.
        os.close(1)
        os.close(2)
        _calls(os.environ).with_name(f"answer.{caller}").write_text(f"{status}\n")
        os._exit(0)


if __name__ == "__main__":
    _serve()
