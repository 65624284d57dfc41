"""Discounted linear Thompson sampling: which arm is probably best in this context.

Each arm has a Gaussian belief over the weights of a linear model of its utility: a mean, and a
precision in units of observations. Per window it is forgotten towards the prior's precision, never
below it ("stabilised" forgetting), while the mean stays. An arm's probability is how often it wins
when every belief is sampled; where there is one cell per window and only the arm that plays is
observed, inverse-gap weighting on the same beliefs does better (Foster and Rakhlin, 2020).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

VERSION = 1
"""Of the saved arrays."""
MIN_SCALE = 0.005
"""Residuals of utility are never believed to be smaller than this."""
SCALE_PRIOR = (0.05, 3.0)
"""Residual standard deviation before any observation, and how many observations it is worth."""


@dataclass(frozen=True, slots=True)
class BanditSettings:
    """How fast to learn, forget and explore."""

    gamma: float = 0.99
    """What is left of an observation's weight after a window."""
    prior_precision: float = 4.0
    """Observations that the prior is worth, per unit of a feature."""
    floor: float = 0.02
    """Share of all decisions spread evenly over the eligible arms."""
    draws: int = 1000
    """Samples from which probabilities are counted."""
    max_inflation: float = 4.0
    """Forgetting makes the variance of an arm that is not observed at most this much larger."""
    gap_scale: float = 1000.0
    """Inverse-gap weighting: of k arms, one worse by k/gap_scale is drawn half as often."""

    def __post_init__(self) -> None:
        if not (0.0 < self.gamma <= 1.0 and self.prior_precision > 0.0 and 0.0 <= self.floor < 1.0):
            raise ValueError("gamma must be in (0, 1], prior_precision above 0 and floor in [0, 1)")
        if not (self.draws > 0 and self.max_inflation >= 1.0 and self.gap_scale > 0.0):
            raise ValueError("draws and gap_scale must be above 0 and max_inflation at least 1")


class LinearThompson:
    """Beliefs about any number of arms over contexts of `features` numbers, the first being 1."""

    def __init__(self, features: int, settings: BanditSettings = BanditSettings()) -> None:
        self.settings = settings
        self.features = features
        self.arms: list[str] = []
        self._precision = np.empty((0, features, features))
        self._mean = np.empty((0, features))
        self._count = np.empty(0)
        self._stale = np.empty(0)
        self._scale = np.array([SCALE_PRIOR[0] * SCALE_PRIOR[1], SCALE_PRIOR[1]])

    # --- arms ---------------------------------------------------------------------------------

    def add(self, arm: str, mean: Floats | float = 0.5) -> None:
        """Begin with an arm of which only a prior mean is known: its weights, or the bias alone."""
        if arm in self.arms:
            raise ValueError(f"arm {arm} is there already")
        weights = np.zeros(self.features)
        if isinstance(mean, float | int):
            weights[0] = mean
        else:
            weights[:] = mean
        prior = self.settings.prior_precision * np.eye(self.features)
        self.arms.append(arm)
        self._precision = np.concatenate([self._precision, prior[None]])
        self._mean = np.concatenate([self._mean, weights[None]])
        self._count = np.append(self._count, 0.0)
        self._stale = np.append(self._stale, 0.0)

    def remove(self, arm: str) -> None:
        """Forget an arm; the others are untouched."""
        i = self.arms.index(arm)
        del self.arms[i]
        self._precision = np.delete(self._precision, i, axis=0)
        self._mean = np.delete(self._mean, i, axis=0)
        self._count = np.delete(self._count, i)
        self._stale = np.delete(self._stale, i)

    def warm_start(self, arm: str, like: str | None, gain: float, pseudo_count: float) -> None:
        """Believe that an arm is `gain` better than `like`, as if seen `pseudo_count` times.

        The gain is what its race measured. Without `like` it is counted from the mean of all arms.
        """
        others = [a for a in self.arms if a != arm]
        if like is not None:
            mean = self.weights(like).copy()
        elif others:
            mean = np.mean([self.weights(a) for a in others], axis=0)
        else:
            mean = self.weights(arm).copy()
        i = self.arms.index(arm)
        mean[0] += gain
        self._mean[i] = mean
        self._precision[i, 0, 0] += max(pseudo_count, 0.0)

    def begin_at(self, level: float) -> None:
        """Let the arms of which nothing was observed yet start from this utility."""
        for i in np.flatnonzero(self._count == 0.0):
            self._mean[i, 0] = level

    def weights(self, arm: str) -> Floats:
        """Return the mean of an arm's weights, (features,)."""
        return self._mean[self.arms.index(arm)]

    def precision(self, arm: str) -> Floats:
        """Return the precision of an arm's weights, (features, features), in observations."""
        return self._precision[self.arms.index(arm)]

    def observations(self, arm: str) -> float:
        """Return the weight of all that was observed of an arm, nothing forgotten."""
        return float(self._count[self.arms.index(arm)])

    # --- learning -----------------------------------------------------------------------------

    def tick(self) -> None:
        """Let one window pass: forget a little of every arm, played or not."""
        gamma = self.settings.gamma
        if gamma < 1.0:
            due = self._stale < np.log(self.settings.max_inflation) / -np.log(gamma)
            self._forget(due, gamma)
        self._stale += 1.0
        prior = np.array([SCALE_PRIOR[0] * SCALE_PRIOR[1], SCALE_PRIOR[1]])
        self._scale = gamma * self._scale + (1.0 - gamma) * prior

    def temper(self, keep: float) -> None:
        """Keep only a share of what is known: the world has changed."""
        self._forget(np.ones(len(self.arms), np.bool_), keep)

    def _forget(self, which: NDArray[np.bool_], keep: float) -> None:
        prior = self.settings.prior_precision * np.eye(self.features)
        self._precision[which] = keep * self._precision[which] + (1.0 - keep) * prior

    def update(
        self, arm: str, context: Floats, utility: float, weight: float = 1.0, imputed: bool = False
    ) -> float:
        """Learn one utility, worth `weight` observations, and return its residual before learning.

        An imputed one (the twin's word) says nothing about how noisy observations are.
        """
        i = self.arms.index(arm)
        residual = utility - float(context @ self._mean[i])
        if weight <= 0.0:
            return residual
        precision = self._precision[i] + weight * np.outer(context, context)
        self._precision[i] = (precision + precision.T) / 2.0
        self._mean[i] += np.linalg.solve(self._precision[i], context) * (weight * residual)
        self._count[i] += weight
        self._stale[i] = 0.0
        if not imputed:
            # E|x| of a normal variable is sd * sqrt(2 / pi); this bears outliers better.
            self._scale += np.array([np.sqrt(np.pi / 2.0) * abs(residual) * weight, weight])
        return residual

    # --- deciding -----------------------------------------------------------------------------

    @property
    def scale(self) -> float:
        """Standard deviation of one observation around its prediction."""
        return max(float(self._scale[0] / self._scale[1]), MIN_SCALE)

    def predict(self, context: Floats) -> tuple[Floats, Floats]:
        """Return mean and standard deviation of the utility expected of each of `arms`."""
        if not self.arms:
            return np.empty(0), np.empty(0)
        right = np.broadcast_to(context[:, None], (len(self.arms), self.features, 1))
        variance = np.maximum(np.linalg.solve(self._precision, right)[:, :, 0] @ context, 0.0)
        return self._mean @ context, self.scale * np.sqrt(variance)

    def probabilities(
        self,
        context: Floats,
        rng: np.random.Generator,
        eligible: Iterable[str] | None = None,
        caps: Mapping[str, float] | None = None,
        sample: bool = True,
        charges: Mapping[str, float] | None = None,
    ) -> dict[str, float]:
        """Return each eligible arm's probability per cell, floor and caps included.

        With `sample` off, inverse-gap weighting takes the place of Thompson sampling. `charges` are
        what it costs to choose an arm [utility].
        """
        names = self.arms if eligible is None else [a for a in self.arms if a in set(eligible)]
        if not names:
            raise ValueError("no arm is eligible; at least one must be able to serve")
        at = [self.arms.index(a) for a in names]
        mean, sd = (v[at] for v in self.predict(context))
        mean = mean - np.array([(charges or {}).get(a, 0.0) for a in names])
        samples = (
            mean + sd * rng.standard_normal((self.settings.draws, len(names))) if sample else None
        )
        limit = np.array([(caps or {}).get(a, 1.0) for a in names])
        p = self._best(mean, samples)
        free = limit >= 1.0
        if free.any() and not free.all():
            # Asked only how often they beat the limited ones too, free arms would be told apart by luck.
            p[~free] = capped(np.append(p[~free], p[free].sum()), np.append(limit[~free], 1.0))[:-1]
            among = self._best(mean[free], samples[:, free] if samples is not None else None)
            p[free] = among * (1.0 - p[~free].sum())
        return dict(zip(names, capped(p, limit).tolist(), strict=True))

    def _best(self, mean: Floats, samples: Floats | None) -> Floats:
        """Return how likely each arm is the best of these, floor included."""
        if samples is not None:
            chosen = np.bincount(samples.argmax(axis=1), minlength=len(mean)) / len(samples)
        else:
            chosen = inverse_gap(mean, self.settings.gap_scale)
        return (1.0 - self.settings.floor) * chosen + self.settings.floor / len(mean)

    # --- state --------------------------------------------------------------------------------

    def to_arrays(self) -> dict[str, NDArray[np.float64] | NDArray[np.uint8]]:
        """Return all that was learned as named arrays."""
        return {
            "version": np.array([VERSION, self.features], np.float64),
            "arms": np.frombuffer("\n".join(self.arms).encode(), np.uint8).copy(),
            "precision": self._precision.copy(),
            "mean": self._mean.copy(),
            "count": self._count.copy(),
            "stale": self._stale.copy(),
            "scale": self._scale.copy(),
        }

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, NDArray[np.generic]], settings: BanditSettings = BanditSettings()
    ) -> "LinearThompson":
        """Read what `to_arrays` gave; ValueError if it was another version."""
        version, features = (int(v) for v in np.asarray(arrays["version"], np.float64))
        if version != VERSION:
            raise ValueError(f"bandit state has version {version}, this program reads {VERSION}")
        bandit = cls(features, settings)
        names = np.asarray(arrays["arms"], np.uint8).tobytes().decode()
        bandit.arms = names.split("\n") if names else []
        n = len(bandit.arms)
        bandit._precision = np.array(arrays["precision"], np.float64).reshape(n, features, features)
        bandit._mean = np.array(arrays["mean"], np.float64).reshape(n, features)
        bandit._count = np.array(arrays["count"], np.float64).reshape(n)
        bandit._stale = np.array(arrays["stale"], np.float64).reshape(n)
        bandit._scale = np.array(arrays["scale"], np.float64).reshape(2)
        return bandit


def inverse_gap(mean: Floats, scale: float) -> Floats:
    """Return probabilities that fall with the gap to the best mean: 1 / (k + scale * gap)."""
    best = int(mean.argmax())
    p = 1.0 / (len(mean) + scale * (mean[best] - mean))
    p[best] = 0.0
    p[best] = 1.0 - p.sum()
    return p


def capped(p: Floats, limit: Floats) -> Floats:
    """Return probabilities below their limits; what was cut off goes to the others in proportion.

    Where the limits leave no room for all of it, they are exceeded in proportion.
    """
    if limit.sum() <= 1.0:
        return limit / limit.sum() if limit.sum() > 0.0 else np.full(len(p), 1.0 / len(p))
    p = p.copy()
    full = np.zeros(len(p), np.bool_)
    while np.any(over := ~full & (p > limit)):
        full |= over
        p[full] = limit[full]
        free = p[~full].sum()
        rest = 1.0 - p[full].sum()
        if free > 0.0:
            p[~full] *= rest / free
        else:
            p[~full] = rest / max(np.count_nonzero(~full), 1)
    return p / p.sum()
