"""What every arm would have earned: the twin's word for all arms, corrected by what was observed.

A settled window is replayed in the twin under every arm (`rehearsal`). The twin is biased, but
knows all arms; observation is unbiased, but knows the played ones. The doubly robust estimate of arm
a in window t is

    r(a) = twin(a) + common(t) + own(a)
    own(a) = sum 1[a played] / p(a) * (observed - twin - common) / (sum 1[a played] / p(a) + 1)

the sums running over windows, older ones counting less: self-normalised inverse-propensity
weighting, shrunk by one pseudo-window. `common(t)` is what the twin misses in this window whichever
arm plays (a slow machine, an odd prompt, cells smaller than the fleet); `own(a)` is where it errs
about one arm alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from autopoiesis.orchestrator.reward import Judged
from autopoiesis.telemetry.records import TwinErrorRow
from autopoiesis.twin.outcome import Status

Floats = NDArray[np.float64]

KEEP = 0.8
"""What is left of an old window's say in `own` after a window: a wrong arm shows within three."""
LARGEST_WEIGHT = 4.0
"""Inverse propensities are cut off here: one rare window must not outvote the recent ones."""
COMMON_RATE = 0.1
"""How fast the lasting part of `common` follows."""
MOST_TWIN_WEIGHT = 0.5
"""The twin's word on an arm never counts more than this, in observations."""
ERROR_PRIOR = 0.15
"""Error of the twin's prediction of utility before any was measured."""
BELIEF_ERROR_PRIOR = 0.1
"""The same of the bandit's prediction."""
PRIOR_WINDOWS = 3.0
"""How many windows these two are worth."""
PROVEN_TRUST = 0.9
"""Trust from which on the twin is proven."""
PROVEN_WINDOWS = 5
"""Windows with a prediction that was checked before the twin can be proven."""
ERROR_KEEP = 0.95
"""What is left of an old squared error after a window."""
BLOCKS = 10
"""Pieces of a window whose spread tells the sampling error: neighbours are not independent."""
INTERVAL_SD = 1.96


class Played(NamedTuple):
    """What was seen of an arm in a window."""

    utility: float
    propensity: float
    requests: int
    predicted: float
    """The utility that the bandit had predicted."""


class TwinCorrection:
    """What observation has taught of the twin's errors, as a whole and arm by arm."""

    def __init__(self) -> None:
        self._own: dict[str, tuple[float, float]] = {}
        self._lasting = 0.0
        self._twin_square = ERROR_PRIOR**2
        self._belief_square = BELIEF_ERROR_PRIOR**2
        self._windows = PRIOR_WINDOWS

    @property
    def error(self) -> float:
        """Root mean square error of the corrected twin's prediction of observed utilities."""
        return sqrt(self._twin_square)

    @property
    def trust(self) -> float:
        """How well the twin predicts against the bandit: 1 where it is at least as good, towards 0."""
        return min(1.0, self._belief_square / max(self._twin_square, 1e-12))

    @property
    def weight(self) -> float:
        """How many observations the twin's word on an arm that did not play is worth."""
        return MOST_TWIN_WEIGHT * self.trust

    @property
    def is_proven(self) -> bool:
        """Tell whether the twin has predicted about as well as the bandit, over enough windows to say so."""
        return self.trust >= PROVEN_TRUST and self._windows >= PRIOR_WINDOWS + PROVEN_WINDOWS

    @property
    def lasting(self) -> float:
        """What the twin misses whichever arm plays, window after window."""
        return self._lasting

    def own(self, arm: str) -> float:
        """Return by how much the twin underrates the arm, apart from what it does to all."""
        total, weight = self._own.get(arm, (0.0, 0.0))
        return total / (weight + 1.0)

    def uncertainty(self, arm: str) -> float:
        """Return the standard error of `own`."""
        return self.error / sqrt(1.0 + self._own.get(arm, (0.0, 0.0))[1])

    def surely(self, arm: str) -> float:
        """Return what is left of `own` when its standard error is taken off: chance alone makes as much."""
        own = self.own(arm)
        return float(np.sign(own)) * max(abs(own) - self.uncertainty(arm), 0.0)

    def learn(self, twin: Mapping[str, float], played: Mapping[str, Played]) -> dict[str, float]:
        """Take a window into account and return each arm's doubly robust estimate for it."""
        known = {arm: p for arm, p in played.items() if arm in twin and p.requests > 0}
        requests = sum(p.requests for p in known.values())
        common = self._lasting
        self._own = {arm: (t * KEEP, w * KEEP) for arm, (t, w) in self._own.items()}
        if requests:
            misses = {a: p.utility - twin[a] - self.own(a) - common for a, p in known.items()}
            weights = {a: p.requests / requests for a, p in known.items()}
            miss = sum(misses[a] * weights[a] for a in known)
            self._windows += 1.0
            rate = max(1.0 / self._windows, 1.0 - ERROR_KEEP)
            square = sum(misses[a] ** 2 * weights[a] for a in known)
            belief = sum((p.utility - p.predicted) ** 2 * weights[a] for a, p in known.items())
            self._twin_square += rate * (square - self._twin_square)
            self._belief_square += rate * (belief - self._belief_square)
            # The more arms played, the better what they share is told from what is their own.
            common += miss * len(known) / (len(known) + 1.0)
            raw = sum((p.utility - twin[a]) * weights[a] for a, p in known.items())
            self._lasting += COMMON_RATE * (raw - self._lasting)
        for arm, p in known.items():
            weight = min(1.0 / max(p.propensity, 1e-9), LARGEST_WEIGHT)
            total, weights_sum = self._own.get(arm, (0.0, 0.0))
            miss = p.utility - twin[arm] - common
            self._own[arm] = (total + weight * miss, weights_sum + weight)
        return {
            arm: min(max(value + common + self.own(arm), 0.0), 1.0) for arm, value in twin.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the state as plain numbers."""
        return {
            "own": {arm: list(sums) for arm, sums in self._own.items()},
            "lasting": self._lasting,
            "squares": [self._twin_square, self._belief_square, self._windows],
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> "TwinCorrection":
        """Read what `to_dict` gave."""
        correction = cls()
        correction._own = {arm: (total, weight) for arm, (total, weight) in state["own"].items()}
        correction._lasting = state["lasting"]
        correction._twin_square, correction._belief_square, correction._windows = state["squares"]
        return correction


@dataclass(frozen=True, slots=True)
class Regret:
    """What the window lost against the best arm there was, with the ends of a 95 % interval."""

    value: float
    low: float
    high: float
    best: str
    """The arm that would have been best."""


def regret_of(
    estimates: Mapping[str, float],
    shares: Mapping[str, float],
    twin: Mapping[str, Judged],
    correction: TwinCorrection,
) -> Regret | None:
    """Compare the best arm's estimate with that of the mixture of arms that played.

    `shares` are the played arms' shares of the requests. None where the twin knows no played arm.
    """
    played = {arm: share for arm, share in shares.items() if arm in estimates and share > 0.0}
    total = sum(played.values())
    if not total:
        return None
    earned = sum(estimates[arm] * share for arm, share in played.items()) / total
    base = sum(twin[arm].utility * share for arm, share in played.items()) / total
    gains: dict[str, tuple[float, float]] = {}
    for arm, estimate in estimates.items():
        model = sum(
            ((float(a == arm) - played.get(a, 0.0) / total) * correction.uncertainty(a)) ** 2
            for a in {arm, *played}
        )
        sampling = _standard_error(twin[arm].utility - base)
        gains[arm] = (estimate - earned, sqrt(sampling**2 + model))
    best = max(gains, key=lambda a: gains[a][0])
    return Regret(
        value=max(gains[best][0], 0.0),
        low=max(0.0, *(gain - INTERVAL_SD * sd for gain, sd in gains.values())),
        high=max(0.0, *(gain + INTERVAL_SD * sd for gain, sd in gains.values())),
        best=best,
    )


def _standard_error(differences: Floats) -> float:
    """Return the standard error of the mean of an autocorrelated series, from its block means."""
    if len(differences) < 2 * BLOCKS:
        return float(differences.std() / sqrt(max(len(differences), 1)))
    means = np.array([block.mean() for block in np.array_split(differences, BLOCKS)])
    return float(means.std(ddof=1)) / sqrt(BLOCKS)


def twin_errors(
    window: int, observed: Judged, twin: Mapping[str, Judged], shares: Mapping[str, float]
) -> list[TwinErrorRow]:
    """Compare means of the window with the twin's, its arms mixed as they played."""
    played = {arm: share for arm, share in shares.items() if arm in twin and share > 0.0}
    total = sum(played.values())
    rows: list[TwinErrorRow] = []
    if not total:
        return rows
    seen = _means(observed)
    simulated = [(_means(twin[arm]), share / total) for arm, share in played.items()]
    for metric, value in seen.items():
        mixed = sum(means[metric] * share for means, share in simulated)
        if np.isfinite(value) and np.isfinite(mixed):
            rows.append(TwinErrorRow(window, metric, value, float(mixed)))
    return rows


def _means(judged: Judged) -> dict[str, float]:
    o = judged.outcome
    done = judged.counts & (o.status == Status.COMPLETED)
    utility = judged.mean_utility()
    return {
        "ttft_mean_s": _mean(o.ttft_s[done]),
        "tpot_mean_s": _mean(o.tpot_s[done]),
        "e2e_mean_s": _mean(o.e2e_s[done]),
        "utility": float("nan") if utility is None else utility,
    }


def _mean(values: Floats) -> float:
    there = values[~np.isnan(values)]
    return float(there.mean()) if len(there) else float("nan")
