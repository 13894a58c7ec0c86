"""The request engine with posted regions, which a backend in another language may use and Python's `place` does not.

Owns the regions posted to each queue and epoch; asks the backend's `place` for them ahead of need.
"""

import random
from collections.abc import Iterator

from support.fakes.request_engine import Lent, Queue, RequestEngine, Stage
from ublkpool.bufpool.sdk.backend import Backend, Device, Outbox
from ublkpool.bufpool.wire import Descriptor, Kind, RawDescriptor


class PostingEngine(RequestEngine):
    """Posts while fewer than `most` regions are lent, so that PLACE has the others."""

    def __init__(
        self, backend: Backend, device: Device, outbox: Outbox, most: int, rng: random.Random
    ) -> None:
        super().__init__(backend, device, outbox)
        self._most, self._rng = most, rng
        self._posted: dict[tuple[int, int], Descriptor] = {}
        self._epochs: dict[int, int] = {}
        self.used = 0

    def _welcome(self, queue: Queue, raw: RawDescriptor) -> None:
        self._epochs[queue.number] = epoch = raw[6]
        for key, post in list(self._posted.items()):
            if key[0] == queue.number and post.epoch < epoch:
                del self._posted[key]
                self._backend.released(post.buffer)

    def _claim(self, queue: Queue, raw: RawDescriptor) -> None:
        """Handle DATA, or RELEASE without DATA, for a posted region like for a placed one."""
        key = (queue.number, raw[12])
        post = self._posted.get(key)
        if post is None or post.epoch != raw[6] or raw[11] != post.segment or (raw[5], raw[7]) in queue.lent:
            return
        assert raw[9] <= post.length, f"{raw} does not fit {post}"
        del self._posted[key]
        self.used += 1
        queue.lent[raw[5], raw[7]] = Lent(raw, post.buffer, Stage.NAMED)

    def _data(self, queue: Queue, raw: RawDescriptor) -> None:
        self._claim(queue, raw)
        super()._data(queue, raw)

    def _release(self, queue: Queue, raw: RawDescriptor) -> None:
        self._claim(queue, raw)
        super()._release(queue, raw)

    def answers(self) -> Iterator[tuple[int, bytes]]:
        """The answers, at times with a POST before them."""
        for queue in self._queues:
            if queue.number in self._epochs and self._rng.random() < 0.5:
                self._post(queue)
        return super().answers()

    def _post(self, queue: Queue) -> None:
        size = self._rng.choice(self._device.post_bytes)
        same = sum(key[0] == queue.number and post.length == size for key, post in self._posted.items())
        if len(self._posted) >= self._most or same >= self._device.depth:
            return
        region = self._backend.place(0, size, 0)
        if region is None:
            return
        post = Descriptor(Kind.POST, 0, 0, self._device.number, queue.number, 0, self._epochs[queue.number], 0, 0,
                          size, 0, self._device.own_segment, region)  # fmt: skip
        self._posted[queue.number, region] = post
        queue.answers.append(post.pack())
