"""Requests that wait for a replica, per arm."""

from typing import NamedTuple

from autopoiesis.gateway.flight import Flight

MOST_HELD = 1024


class Queue(NamedTuple):
    """Where a request waits: an arm's own queue, or what it still holds where another arm has taken over."""

    arm_id: str
    """Whose ceiling and order the requests leave by."""
    host_id: str
    """The arm on whose replicas they go: it serves their shards now."""

    @property
    def of_guest(self) -> bool:
        """Whether the arm serves there no more."""
        return self.arm_id != self.host_id


class HeldQueues:
    """Have room for `capacity` requests each; in what order they leave is the arm's business."""

    def __init__(self, capacity: int = MOST_HELD) -> None:
        self._capacity = capacity
        self._waiting: dict[Queue, dict[str, Flight]] = {}
        self._queue_of: dict[str, Queue] = {}

    def __len__(self) -> int:
        return len(self._queue_of)

    def queues(self) -> list[Queue]:
        """Return the queues in which requests wait, those of guests last."""
        return sorted(self._waiting, key=lambda queue: queue.of_guest)

    def has(self, queue: Queue) -> bool:
        """Tell whether any request waits in a queue."""
        return queue in self._waiting

    def of(self, queue: Queue) -> list[Flight]:
        """Return the requests that wait in a queue, in order of arrival."""
        return list(self._waiting.get(queue, {}).values())

    def is_full(self, queue: Queue) -> bool:
        """Tell whether there is no room for a new request; those of two queues that become one all stay."""
        return len(self._waiting.get(queue, {})) >= self._capacity

    def add(self, queue: Queue, flight: Flight) -> None:
        """Let a request wait."""
        self._waiting.setdefault(queue, {})[flight.key] = flight
        self._queue_of[flight.key] = queue

    def remove(self, flight: Flight) -> Queue | None:
        """Take a request out and return where it was, None if it did not wait."""
        queue = self._queue_of.pop(flight.key, None)
        if queue is not None:
            del self._waiting[queue][flight.key]
            if not self._waiting[queue]:
                del self._waiting[queue]
        return queue

    def take_all(self) -> list[Flight]:
        """Empty all queues and return what was in them, in order of arrival."""
        flights = [f for waiting in self._waiting.values() for f in waiting.values()]
        self._waiting.clear()
        self._queue_of.clear()
        return sorted(flights, key=lambda f: f.arrived_s)
