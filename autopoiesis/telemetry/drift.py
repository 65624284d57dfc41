"""Drift: has the mean of a stream changed, and since when?

ADWIN (Bifet and Gavalda, "Learning from time-changing data with adaptive windowing", 2007) keeps a
window of the recent past and cuts off its old end whenever two parts of it have means that differ
by more than chance allows. The window lies in an exponential histogram: O(log n) numbers.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

BUCKETS_PER_SIZE = 5
"""Buckets of one size before the two oldest of them are merged (M of the paper)."""
LEAST_SIDE = 5
"""Observations each side of a cut must have."""


class Adwin:
    """Adaptive windowing over a stream of numbers in [0, 1]."""

    def __init__(self, delta: float = 0.002) -> None:
        if not 0 < delta < 1:
            raise ValueError(f"delta must lie between 0 and 1, got {delta}")
        self.delta = delta
        self._size: list[int] = []
        self._mean: list[float] = []
        self._spread: list[float] = []
        """Per bucket, oldest first: observations, their mean, their squared deviations from it."""

    def __len__(self) -> int:
        """Return how many observations the window holds."""
        return sum(self._size)

    @property
    def mean(self) -> float:
        """The mean of the window; NaN while it is empty."""
        n = len(self)
        return (
            sum(s * m for s, m in zip(self._size, self._mean, strict=True)) / n if n else math.nan
        )

    def update(self, x: float) -> bool:
        """Take one observation; return True if the mean has changed.

        Raises:
            ValueError: `x` is not finite.
        """
        if not math.isfinite(x):
            raise ValueError(f"an observation must be finite, got {x}")
        self._size.append(1)
        self._mean.append(float(x))
        self._spread.append(0.0)
        self._merge()
        changed = False
        while cut := self._best_cut():
            del self._size[:cut], self._mean[:cut], self._spread[:cut]
            changed = True
        return changed

    def _merge(self) -> None:
        """Wherever more than `BUCKETS_PER_SIZE` buckets have one size, merge the two oldest."""
        size, end = 1, len(self._size)
        while True:
            start = end
            while start > 0 and self._size[start - 1] == size:
                start -= 1
            if end - start <= BUCKETS_PER_SIZE:
                return
            older, newer = self._mean[start], self._mean[start + 1]
            self._size[start : start + 2] = [2 * size]
            self._mean[start : start + 2] = [(older + newer) / 2]
            gap = (older - newer) ** 2 * size / 2
            self._spread[start : start + 2] = [self._spread[start] + self._spread[start + 1] + gap]
            size, end = 2 * size, start + 1

    def _best_cut(self) -> int:
        """Return how many of the oldest buckets differ most clearly from the rest; 0 if none do.

        The bound is ADWIN2's: with 1/m = 1/n0 + 1/n1 and L = ln(2 ln(n) / delta),
        |mean0 - mean1| > sqrt(2/m var L) + 2/(3m) L.
        """
        n = len(self)
        if n < 2 * LEAST_SIDE:
            return 0
        size, mean = np.array(self._size, float), np.array(self._mean)
        older = np.cumsum(size)[:-1]
        newer = n - older
        sums = np.cumsum(size * mean)
        total = sums[-1]
        gap = np.abs(sums[:-1] / older - (total - sums[:-1]) / newer)
        variance = (sum(self._spread) + float(size @ (mean - total / n) ** 2)) / n
        log = math.log(2 * math.log(n) / self.delta)
        inverse_m = 1 / older + 1 / newer
        bound = np.sqrt(2 * inverse_m * variance * log) + 2 / 3 * inverse_m * log
        allowed = (older >= LEAST_SIDE) & (newer >= LEAST_SIDE)
        excess = np.where(allowed, gap - bound, -1.0)
        cut = int(np.argmax(excess))
        return cut + 1 if excess[cut] > 0 else 0

    def state(self) -> Floats:
        """Return the window as a (3, buckets) array: sizes, means, squared deviations."""
        return np.array([self._size, self._mean, self._spread], float).reshape(3, -1)

    @classmethod
    def restored(cls, state: Floats, delta: float = 0.002) -> "Adwin":
        """Make a detector that goes on where `state` left off.

        Raises:
            ValueError: the array is no state of a detector.
        """
        if state.ndim != 2 or len(state) != 3 or not np.isfinite(state).all():
            raise ValueError(
                f"a detector's state is a finite (3, buckets) array, got {state.shape}"
            )
        adwin = cls(delta)
        adwin._size = [int(s) for s in state[0]]
        adwin._mean, adwin._spread = state[1].tolist(), state[2].tolist()
        return adwin


WARM_UP = 20
"""Residuals a detector collects before it knows their usual level and spread."""
CLIP = 5.0
"""Residuals are cut off at this many usual spreads, so that one freak does not look like a change."""
UNIT = 3.0
"""Usual spreads that make ADWIN's unit range. Smaller is faster, and takes autocorrelation for change."""


class DriftMonitor:
    """One ADWIN per named residual: context, reward, twin error, each arm.

    A detector first learns the usual level and spread of its residual, in whatever unit, and then
    watches how many spreads the residual lies off that level. When it fires it starts anew, so it
    stays silent for the length of a warm-up. Spreads below `least_spread` (in the residuals' unit)
    count as that much: a residual that hardly ever moved is no reason for alarm when it does a bit.
    """

    def __init__(self, delta: float = 0.002, least_spread: float = 0.01) -> None:
        if not least_spread > 0:
            raise ValueError(f"least_spread must be above 0, got {least_spread}")
        self.delta = delta
        self.least_spread = least_spread
        self._usual: dict[str, list[float]] = {}
        """Residuals seen in the warm-up; no more than `WARM_UP`."""
        self._adwin: dict[str, Adwin] = {}

    def observe(self, residuals: Mapping[str, float]) -> tuple[str, ...]:
        """Take one window's residuals and return the names whose mean has changed.

        A residual that is not finite (an arm that was not played) is passed over.
        """
        return tuple(
            name
            for name, x in residuals.items()
            if math.isfinite(x) and self._fires(name, float(x))
        )

    def _fires(self, name: str, x: float) -> bool:
        usual = self._usual.setdefault(name, [])
        adwin = self._adwin.setdefault(name, Adwin(self.delta))
        if len(usual) < WARM_UP:
            usual.append(x)
            for past in usual if len(usual) == WARM_UP else ():
                adwin.update(self._standardised(past, usual))
            return False
        if not adwin.update(self._standardised(x, usual)):
            return False
        self.forget(name)
        return True

    def _standardised(self, x: float, usual: list[float]) -> float:
        """Return how far x lies off the usual level, in `UNIT` standard deviations, clipped."""
        level = sum(usual) / len(usual)
        spread = math.sqrt(sum((u - level) ** 2 for u in usual) / len(usual))
        return min(max((x - level) / max(spread, self.least_spread), -CLIP), CLIP) / UNIT

    def forget(self, name: str) -> None:
        """Drop a detector: its arm is gone, or what it watches was changed on purpose."""
        self._usual.pop(name, None)
        self._adwin.pop(name, None)

    def state(self) -> dict[str, NDArray[Any]]:
        """Return all detectors as arrays, named `drift/<name>/usual` and `drift/<name>/window`."""
        arrays: dict[str, NDArray[Any]] = {}
        for name, adwin in self._adwin.items():
            arrays[f"drift/{name}/usual"] = np.array(self._usual[name])
            arrays[f"drift/{name}/window"] = adwin.state()
        return arrays

    @classmethod
    def restored(
        cls, state: Mapping[str, NDArray[Any]], delta: float = 0.002, least_spread: float = 0.01
    ) -> "DriftMonitor":
        """Make a monitor from the arrays of `state`; arrays of other owners are passed over."""
        monitor = cls(delta, least_spread)
        for key, array in state.items():
            if key.startswith("drift/") and key.endswith("/window"):
                name = key.removeprefix("drift/").removesuffix("/window")
                monitor._adwin[name] = Adwin.restored(array, delta)
                monitor._usual[name] = state[f"drift/{name}/usual"].tolist()
        return monitor
