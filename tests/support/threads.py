"""What /proc tells of the threads of a process."""

from contextlib import suppress
from pathlib import Path


def of_each_thread(pid: int, name: str) -> dict[int, str]:
    """The text of /proc/PID/task/*/`name` by thread; empty if the process has ended.

    A thread that ends meanwhile is left out: one that has been joined is listed for a moment longer, and io_uring's
    threads end by themselves.
    """
    found = {}
    # A process that ends meanwhile ends the listing as well.
    with suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):
                found[int(task.name)] = (task / name).read_text()
    return found


def names_of(pid: int) -> list[str]:
    """The names of a process's threads."""
    return [text.strip() for text in of_each_thread(pid, "comm").values()]
