"""On which CPU a queue's worker runs.

Owns the choice, and the text in which users name CPUs: `auto`, `off`, or a list as the kernel writes it, `0-3,8`.
"""

from collections.abc import Collection


def parse_cpus(text: str) -> frozenset[int]:
    """The CPUs of a list such as `0-3,8`.  Raises `ValueError` if it is none."""
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
    """One of the CPUs whose requests come to the queue, of those that we may use; None: wherever the scheduler likes.

    With a list one of those that are on it, or, if none of them is the queue's, any on it.  Devices begin at different
    ones: queues that share all their CPUs shall not share their workers'.
    """
    if affinity == "off":
        return None
    wanted = set(allowed) if affinity == "auto" else parse_cpus(affinity) & set(allowed)
    usable = sorted(wanted & set(queue_cpus) or (wanted if affinity != "auto" else ()))
    return usable[(device_number + queue) % len(usable)] if usable else None
