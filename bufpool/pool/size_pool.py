"""The buffers of one size of a device's pool: which are free, what each queue holds, and which queues wait.

Owns the rules of fairness.  Pure counting: queues are numbers, and every argument is valid; `lease.py` checks it.
"""

from collections import deque
from collections.abc import Iterable


def held_max(count: int, reserve: int, queues: int) -> int:
    """The most of `count` buffers that one of `queues` queues can hold: the other queues keep their reserves."""
    return count - reserve * (queues - 1)


class SizePool:
    """The buffers of one size, `reserve` of them kept for each queue.

    `held`, `wanted` and `recalled` count buffers for each queue: what it has, waits for, and was asked to return.
    """

    def __init__(self, slots: range, reserve: int, queues: int) -> None:
        # The buffer returned last is granted next: its content is still in the CPU caches.
        self.free = list(reversed(slots))
        self.held = [0] * queues
        self.wanted = [0] * queues
        self.recalled = [0] * queues
        self.waiting: deque[int] = deque()
        self.reserve = reserve
        self.unclaimed = reserve * queues
        self.held_max = held_max(len(slots), reserve, queues)
        self.fair_share = len(slots) // queues

    def lacking(self, queue: int) -> int:
        """How many buffers the queue lacks of its reserve."""
        return max(0, self.reserve - self.held[queue])

    def available(self, queue: int) -> int:
        """How many free buffers are not kept for other queues' reserves."""
        return len(self.free) - (self.unclaimed - self.lacking(queue))

    def take(self, queue: int) -> int:
        """Give the queue a free buffer; returns its slot."""
        self.unclaimed -= self.lacking(queue) > 0
        self.held[queue] += 1
        return self.free.pop()

    def put(self, queue: int, slot: int) -> None:
        """Take a buffer back from the queue."""
        self.free.append(slot)
        self.held[queue] -= 1
        self.unclaimed += self.lacking(queue) > 0
        self.recalled[queue] = max(0, self.recalled[queue] - 1)

    def wait(self, queue: int, count: int) -> int:
        """Let the queue wait for `count` more buffers; returns how many of them it can never hold and does not get."""
        room = self.held_max - self.held[queue] - self.wanted[queue]
        accepted = max(0, min(count, room))
        if accepted and not self.wanted[queue]:
            self.waiting.append(queue)
        self.wanted[queue] += accepted
        return count - accepted

    def cancel(self, queue: int) -> None:
        """End the queue's waiting."""
        if self.wanted[queue]:
            self.waiting.remove(queue)
            self.wanted[queue] = 0
        self.recalled[queue] = 0

    def serve(self) -> dict[int, list[int]]:
        """Give free buffers to waiting queues, one buffer in turn, until none of them can have another."""
        served: dict[int, list[int]] = {}
        refused = 0
        while refused < len(self.waiting):
            queue = self.waiting.popleft()
            if self.available(queue) > 0:
                served.setdefault(queue, []).append(self.take(queue))
                self.wanted[queue] -= 1
                refused = 0
            else:
                refused += 1
            if self.wanted[queue]:
                self.waiting.append(queue)
        if not self.waiting:
            self.recalled = [0] * len(self.recalled)
        return served

    def recalls(self) -> list[int]:
        """The queues that should be asked for more buffers than before; `recalled` says how many in all.

        Queues that do not wait return buffers first, down to their reserve.  Queues that wait themselves return only
        what they hold above an even share, and only for queues below it.
        """
        if not self.waiting:
            return []
        due = sum(self.recalled)
        idle = [queue for queue in range(len(self.held)) if not self.wanted[queue]]
        first = self._ask(idle, self.reserve, sum(self.wanted) - due)
        poor = sum(
            min(self.wanted[queue], max(0, self.fair_share - self.held[queue])) for queue in self.waiting
        )
        busy_floor = max(self.reserve, self.fair_share)
        return first + self._ask(self.waiting, busy_floor, poor - sum(self.recalled))

    def _ask(self, queues: Iterable[int], floor: int, count: int) -> list[int]:
        asked = []
        for queue in sorted(queues, key=lambda each: -self.held[each]):
            more = min(count, self.held[queue] - self.recalled[queue] - floor)
            if more > 0:
                self.recalled[queue] += more
                count -= more
                asked.append(queue)
        return asked
