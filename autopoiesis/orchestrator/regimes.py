"""Regimes: kinds of traffic that were met before, and how the arms did in each.

The bandit's model is linear in the context and forgets with time. What was learned of a kind of traffic
is kept here beside it, and forgets only while that kind is there: when it comes back, what is
remembered counts at once as observations. Windows are assigned to the nearest regime; one that is far
from all of them begins a new one (leader clustering, Hartigan, 1975), and of too many the one that was
seen least and longest ago is given up.
"""

from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray

from autopoiesis.orchestrator.context import NAMES, PRIOR_SD

Floats = NDArray[np.float64]

VERSION = 1
"""Of the saved arrays."""
MOST_REGIMES = 32
TRAITS = (
    "log_rate_rps",
    "log_input_tokens_mean",
    "log_input_tokens_p90",
    "log_output_tokens_mean",
    "prefix_share",
    "log_replicas",
)
"""What makes a regime: numbers that are no consequence of the arm that serves."""
NEAR = 2.0
"""Farthest that a window may be from its regime, in standard deviations of the context."""
CENTRE_WINDOWS = 50.0
"""Windows over which a regime's centre is averaged; it follows slow changes."""
KEEP = 0.97
"""What is left of an old window's say after another one of the same regime."""
MOST_RECALLED = 4.0
"""Observations that a memory of an arm is worth at most."""
KNOWN_WINDOWS = 3
"""Windows after which a regime is known."""
LEAST_GAIN = 0.01
"""Utility by which an arm must have been better here than the one that serves, to take its place at once."""
FADE = 0.999
"""By how much a regime's visits count less per window since the last, when one has to go."""

_AT = [NAMES.index(name) for name in TRAITS]
_SCALE = PRIOR_SD[_AT]


class Regimes:
    """The regimes that are remembered, and the present one."""

    def __init__(self) -> None:
        self.remembers = True
        """Whether anything is; an evaluation without memory switches it off."""
        self.present: int | None = None
        """Number of the present regime, None before the first window with requests."""
        self.returned = False
        """Whether a known regime has just taken the place of another one."""
        self.arms: list[str] = []
        self._windows = 0.0
        self._centre = np.empty((0, len(TRAITS)))
        self._visits = np.empty(0)
        self._last = np.empty(0)
        self._sums = np.empty((0, 0, 2))
        """Per regime and arm: sum of weighted advantages, and sum of weights."""

    def __len__(self) -> int:
        return len(self._visits)

    def enter(self, context: Mapping[str, float]) -> None:
        """Take the context of a window that has just ended for the present one; empty ones change nothing."""
        self._windows += 1.0
        self.returned = False
        if not self.remembers or context["log_rate_rps"] <= 0.0:
            return
        before, traits = self.present, _traits(context)
        at = self._nearest(traits)
        if at is None:
            at = self._begin(traits)
            before = None if before == at else before
        self._visits[at] += 1.0
        self._centre[at] += (traits - self._centre[at]) / min(self._visits[at], CENTRE_WINDOWS)
        self._last[at] = self._windows
        self.present = at
        self.returned = before is not None and before != at and self._visits[at] > KNOWN_WINDOWS

    def learn(
        self, context: Mapping[str, float], advantages: Mapping[str, tuple[float, float]]
    ) -> None:
        """Remember each arm's advantage, and its weight in observations, in the regime of `context`."""
        at = self._nearest(_traits(context)) if context.get("log_rate_rps", 0.0) > 0.0 else None
        if at is None:
            return
        self._sums[at] *= KEEP
        for arm, (advantage, weight) in advantages.items():
            if arm in self.arms:
                self._sums[at, self.arms.index(arm)] += (advantage * weight, weight)

    def recalled(self) -> dict[str, tuple[float, float]]:
        """Return what is remembered of the arms in the present regime: advantage, and its weight."""
        if self.present is None:
            return {}
        return {
            arm: (float(total / weight), min(float(weight), MOST_RECALLED))
            for arm, (total, weight) in zip(self.arms, self._sums[self.present], strict=True)
            if weight > 0.0
        }

    def champion(self, arms: Collection[str]) -> str | None:
        """Return which of the arms has done best in the present regime, None where nobody knows."""
        known = {a: gain for a, (gain, weight) in self.recalled().items() if weight >= 1.0}
        return max((a for a in arms if a in known), key=lambda a: known[a], default=None)

    def successor(self, arms: Collection[str], serving: str) -> str | None:
        """Return which of the arms is to take the place of the `serving` one, now that a known regime is back."""
        best = self.champion(arms) if self.returned else None
        if best is None or best == serving:
            return None
        recalled = self.recalled()
        gain, weight = recalled.get(serving, (0.0, 0.0))
        better = recalled[best][0] - gain > LEAST_GAIN
        return best if better and weight >= 1.0 else None

    def meet(self, arms: Collection[str]) -> None:
        """Know these arms and no others."""
        kept = [i for i, arm in enumerate(self.arms) if arm in arms]
        new = [arm for arm in arms if arm not in self.arms]
        if new or len(kept) < len(self.arms):
            self.arms = [self.arms[i] for i in kept] + new
            blank = np.zeros((len(self), len(new), 2))
            self._sums = np.concatenate([self._sums[:, kept], blank], axis=1)

    def temper(self, keep: float) -> None:
        """Keep only a share of what is known: the world has changed."""
        self._sums *= keep

    def _nearest(self, traits: Floats) -> int | None:
        if not len(self):
            return None
        distance = np.sqrt((((self._centre - traits) / _SCALE) ** 2).sum(axis=1))
        at = int(distance.argmin())
        return at if distance[at] <= NEAR else None

    def _begin(self, traits: Floats) -> int:
        if len(self) < MOST_REGIMES:
            self._centre = np.concatenate([self._centre, traits[None]])
            self._visits, self._last = np.append(self._visits, 0.0), np.append(self._last, 0.0)
            blank = np.zeros((1, len(self.arms), 2))
            self._sums = np.concatenate([self._sums, blank])
            return len(self) - 1
        at = int((self._visits * FADE ** (self._windows - self._last)).argmin())
        self._centre[at], self._visits[at], self._sums[at] = traits, 0.0, 0.0
        return at

    def to_arrays(self) -> dict[str, NDArray[np.float64] | NDArray[np.uint8]]:
        """Return all that is remembered as named arrays."""
        present = -1.0 if self.present is None else float(self.present)
        return {
            "version": np.array([VERSION, self._windows, present, float(self.returned)]),
            "arms": np.frombuffer("\n".join(self.arms).encode(), np.uint8).copy(),
            "centre": self._centre.copy(),
            "visits": self._visits.copy(),
            "last": self._last.copy(),
            "sums": self._sums.copy(),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> "Regimes":
        """Read what `to_arrays` gave; ValueError if it was another version."""
        version, windows, present, returned = np.asarray(arrays["version"], np.float64)
        if int(version) != VERSION:
            raise ValueError(f"regimes have version {version:g}, this program reads {VERSION}")
        regimes = cls()
        regimes._windows = float(windows)
        regimes.present = int(present) if present >= 0.0 else None
        regimes.returned = bool(returned)
        names = np.asarray(arrays["arms"], np.uint8).tobytes().decode()
        regimes.arms = names.split("\n") if names else []
        regimes._centre = np.array(arrays["centre"], np.float64).reshape(-1, len(TRAITS))
        n = len(regimes._centre)
        regimes._visits = np.array(arrays["visits"], np.float64).reshape(n)
        regimes._last = np.array(arrays["last"], np.float64).reshape(n)
        sums = np.array(arrays["sums"], np.float64)
        regimes._sums = sums.reshape(n, len(regimes.arms), 2)
        return regimes


def _traits(context: Mapping[str, float]) -> Floats:
    return np.array([context[name] for name in TRAITS])
