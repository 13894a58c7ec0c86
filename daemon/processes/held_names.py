"""The names under which the holder keeps descriptors from one supervisor to the next."""


def worker_name(device: str, queue: int) -> str:
    """Under which the holder has a worker's socket."""
    return f"{device}/worker/{queue}"


def session_names(device: str) -> tuple[str, str]:
    """Under which the holder has a backend's connection and its segment."""
    return f"{device}/session", f"{device}/segment"


def stderr_name(device: str) -> str:
    """Under which the holder has what a backend that the daemon runs itself says."""
    return f"{device}/stderr"


def pool_name(device: str) -> str:
    """Under which the holder has the memory of a device's pool."""
    return f"{device}/pool"


def slice_name(device: str, number: int) -> str:
    """Under which the holder has a slice."""
    return f"{device}/slice/{number}"


def client_name(device: str, number: int) -> str:
    """Under which the holder has the connection of a slice's client."""
    return f"{device}/client/{number}"
