"""Requests that wait for a replica, per arm."""

from autopoiesis.gateway.flight import Flight

MOST_HELD = 1024


class HeldQueue:
    """Holds at most `capacity` requests per arm; in what order they leave is the arm's business."""

    def __init__(self, capacity: int = MOST_HELD) -> None:
        self._capacity = capacity
        self._waiting: dict[str, dict[str, Flight]] = {}

    def __len__(self) -> int:
        return sum(len(flights) for flights in self._waiting.values())

    def arms(self) -> list[str]:
        """Return the arms for which requests wait."""
        return list(self._waiting)

    def has(self, arm_id: str) -> bool:
        """Tell whether any request waits for an arm."""
        return arm_id in self._waiting

    def of(self, arm_id: str) -> list[Flight]:
        """Return the requests that wait for an arm, in order of arrival."""
        return list(self._waiting.get(arm_id, {}).values())

    def add(self, arm_id: str, flight: Flight) -> bool:
        """Let a request wait; False if there is no room."""
        flights = self._waiting.setdefault(arm_id, {})
        if len(flights) >= self._capacity:
            return False
        flights[flight.key] = flight
        return True

    def remove(self, arm_id: str, flight: Flight) -> bool:
        """Take a request out; False if it was not there."""
        flights = self._waiting.get(arm_id, {})
        if flights.pop(flight.key, None) is None:
            return False
        if not flights:
            del self._waiting[arm_id]
        return True

    def take_all(self) -> list[Flight]:
        """Empty the queue and return what was in it, in order of arrival."""
        flights = [f for waiting in self._waiting.values() for f in waiting.values()]
        self._waiting.clear()
        return sorted(flights, key=lambda f: f.arrived_s)
