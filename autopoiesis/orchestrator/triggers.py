"""When to ask for new arms, and why.

Asked for when the regret of windows in a row is above a threshold with confidence, when something
drifted, when the fleet has become another, or when even the best arm stays below the target. While all
is well, policies are bred for a surge that has not come yet. One cycle
at a time, then a pause, and no more than a number per hour.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

HOUR_S = 3600.0
ENOUGH_WINDOWS = 6
"""Windows with requests before policies can be bred for a surge of them."""


@dataclass(frozen=True, slots=True)
class TriggerSettings:
    """How soon and how often to ask."""

    regret: float = 0.02
    """Utility that a window may lose before it counts as regretted."""
    target: float = 0.95
    """Utility below which even the best arm is not good enough."""
    windows: int = 3
    """How many windows in a row must say so."""
    cooldown_s: float = 60.0
    """Shortest time from the end of one cycle to the next trigger."""
    per_hour: int = 30
    prepare_s: float = 600.0
    """Longest time without a cycle until one prepares for a surge, at once where there have been twice as many
    windows as at the last; 0: never."""


@dataclass(frozen=True, slots=True)
class Trigger:
    """A reason to ask for new arms."""

    kind: str
    """regret, drift, target, capacity, surge or operator."""
    window: int
    at_s: float
    why: str
    """One line."""
    since: int | None = None
    """The first of the windows that gave the reason; None if an operator asked."""


class Triggers:
    """The trigger's memory."""

    def __init__(self, settings: TriggerSettings = TriggerSettings()) -> None:
        self.settings = settings
        self._regretted = 0
        self._below = 0
        self._drifted: list[str] = []
        self._drifted_since = 0
        self._capacity = ""
        self._capacity_since = 0
        self._busy = False
        self._quiet_until_s = float("-inf")
        self._fired_s: list[float] = []
        self._windows = 0
        """Windows with requests so far."""
        self._bred_on = 0
        """How many there were when the last cycle was asked for."""

    def consider(
        self,
        window: int,
        at_s: float,
        regret_low: float | None,
        best: float | None,
        drifted: Sequence[str],
    ) -> Trigger | None:
        """Take a settled window into account and return the trigger that it fires, if any.

        `regret_low` is the lower end of the regret's interval, `best` the estimate of the best arm;
        None where nothing is known. Drift that falls into a pause is remembered until after it.
        """
        s = self.settings
        if regret_low is not None:
            self._regretted = self._regretted + 1 if regret_low > s.regret else 0
        if best is not None:
            self._windows += 1
            self._below = self._below + 1 if best < s.target else 0
        if drifted and not self._drifted:
            self._drifted_since = window
        self._drifted += [name for name in drifted if name not in self._drifted]
        if not self.ready(at_s):
            return None
        if regret_low is not None and self._regretted >= s.windows:
            why = f"regret above {s.regret:g} for {self._regretted} windows (at least {regret_low:.3f})"
            return self._fire("regret", window, at_s, why, window + 1 - self._regretted)
        if self._drifted:
            why = f"drift of {', '.join(self._drifted)}"
            return self._fire("drift", window, at_s, why, self._drifted_since)
        if self._capacity:
            why, since = f"the fleet has changed: {self._capacity}", self._capacity_since
            self._capacity = ""
            return self._fire("capacity", window, at_s, why, since)
        if best is not None and self._below >= s.windows:
            why = f"best arm below {s.target:g} for {self._below} windows (now {best:.3f})"
            return self._fire("target", window, at_s, why, window + 1 - self._below)
        if self._unprepared(at_s):
            why = "all is well; policies are wanted that would stand a surge"
            return self._fire("surge", window, at_s, why, window)
        return None

    def _unprepared(self, at_s: float) -> bool:
        after_s = self.settings.prepare_s
        last_s = max(self._fired_s, default=float("-inf"))
        if after_s <= 0.0 or self._windows < ENOUGH_WINDOWS:
            return False
        return at_s - last_s >= after_s or self._windows >= 2 * self._bred_on

    def capacity_changed(self, window: int, what: str) -> None:
        """Note in a line that the fleet has changed in this window; the next one that may fires."""
        if not self._capacity:
            self._capacity_since = window
        self._capacity = what

    def ready(self, at_s: float) -> bool:
        """Tell whether a cycle may begin now."""
        self._fired_s = [t for t in self._fired_s if at_s - t < HOUR_S]
        spent = len(self._fired_s) >= self.settings.per_hour
        return not (self._busy or spent or at_s < self._quiet_until_s)

    def _fire(self, kind: str, window: int, at_s: float, why: str, since: int) -> Trigger:
        self._regretted = self._below = 0
        self._bred_on = self._windows
        self._drifted = []
        self._fired_s.append(at_s)
        self._quiet_until_s = at_s + self.settings.cooldown_s
        return Trigger(kind, window, at_s, why, since)

    def began(self) -> None:
        """Note that a cycle runs; until `ended` no other begins."""
        self._busy = True

    def ended(self, at_s: float) -> None:
        """Note that the cycle is over, however it went."""
        self._busy = False
        self._quiet_until_s = max(self._quiet_until_s, at_s + self.settings.cooldown_s)

    def follow_clock(self, by_s: float) -> None:
        """Move all times that are remembered: the clock was set by so much."""
        self._quiet_until_s += by_s
        self._fired_s = [at_s + by_s for at_s in self._fired_s]

    def to_dict(self) -> dict[str, Any]:
        """Return the state as plain values; a running cycle does not outlive its process."""
        return {
            "regretted": self._regretted,
            "below": self._below,
            "drifted": list(self._drifted),
            "drifted_since": self._drifted_since,
            "capacity": [self._capacity, self._capacity_since],
            "quiet_until_s": max(self._quiet_until_s, 0.0),
            "fired_s": list(self._fired_s),
            "windows": self._windows,
            "bred_on": self._bred_on,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `to_dict` gave."""
        self._regretted = state["regretted"]
        self._below = state["below"]
        self._drifted = list(state["drifted"])
        self._drifted_since = state.get("drifted_since", 0)
        self._capacity, self._capacity_since = state.get("capacity", ("", 0))
        self._quiet_until_s = state["quiet_until_s"]
        self._fired_s = list(state["fired_s"])
        self._windows = state.get("windows", 0)
        self._bred_on = state.get("bred_on", self._windows)
