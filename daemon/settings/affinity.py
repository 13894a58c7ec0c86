"""The CPU on which a queue's worker runs.

Owns the choice and the syntax of the key `affinity`: `auto`, `off`, or a list in the kernel's format, `0-3,8`.
"""

from collections.abc import Collection


def parse_cpus(text: str) -> frozenset[int]:
    """The CPUs of a list such as `0-3,8`.  Raises `ValueError` if the text is no such list or names no CPU."""
    cpus: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        cpus |= set(range(int(first), int(last if dash else first) + 1))
    if not cpus or min(cpus) < 0:
        raise ValueError(f"{text!r} names no CPU")
    return frozenset(cpus)


def cpu_for(
    affinity: str, device_number: int, queue: int, queue_cpus: Collection[int], allowed: Collection[int]
) -> int | None:
    """The CPU for the worker of a queue; None: the scheduler chooses.

    `queue_cpus`: CPUs whose requests come to this hardware queue; `allowed`: this process's CPU affinity.  `auto` takes
    an allowed CPU of the queue.  A list takes a listed and allowed CPU of the queue or, without one, any listed and
    allowed CPU.  Each device starts at another CPU, so that queues with the same CPUs get workers on different ones.
    """
    if affinity == "off":
        return None
    wanted = set(allowed) if affinity == "auto" else parse_cpus(affinity) & set(allowed)
    usable = sorted(wanted & set(queue_cpus) or (wanted if affinity != "auto" else ()))
    return usable[(device_number + queue) % len(usable)] if usable else None
