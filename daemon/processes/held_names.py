"""The names of the descriptors that the holder keeps for the next supervisor."""


def worker_name(device: str, queue: int) -> str:
    """A worker's socket."""
    return f"{device}/worker/{queue}"


def session_names(device: str) -> tuple[str, str]:
    """A backend's connection, and its segment."""
    return f"{device}/session", f"{device}/segment"


def stderr_name(device: str) -> str:
    """The pipe from the stderr of a backend that the daemon runs itself."""
    return f"{device}/stderr"


def opener_names(device: str) -> tuple[str, str]:
    """The pidfd of the process that the driver takes for an ordinary user's server, and the pipe for which it lives."""
    return f"{device}/opener", f"{device}/opener/life"


def pool_name(device: str) -> str:
    """The memory of a device's pool."""
    return f"{device}/pool"


def disk_memory_name(device: str) -> str:
    """The memory disk that a device's workers serve themselves."""
    return f"{device}/disk"


def slice_name(device: str, number: int) -> str:
    """A slice of the client area."""
    return f"{device}/slice/{number}"


def client_name(device: str, number: int) -> str:
    """The connection of the client that has the slice."""
    return f"{device}/client/{number}"
