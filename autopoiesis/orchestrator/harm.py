"""Has an arm done harm? An answer that may be asked for after every window.

The mean difference to a control is bounded by a confidence sequence: an interval that holds at all
times at once with probability 1 - alpha, however often one looks (predictable plug-in empirical
Bernstein, Waudby-Smith and Ramdas, 2024, theorem 2, one-sided on each side).
"""

import math
from dataclasses import dataclass

LARGEST_DIFFERENCE = 0.5
"""Differences of utility beyond this count as this; a narrower range is decided sooner."""


@dataclass(frozen=True, slots=True)
class HarmTest:
    """Sums over an arm's differences to its control, one per window; `observe` gives the next."""

    windows: int = 0
    total: float = 0.0
    squares: float = 0.0
    bets: float = 0.0
    bets_total: float = 0.0
    penalty: float = 0.0
    alpha: float = 0.05

    def observe(self, difference: float) -> "HarmTest":
        """Take one window's utility minus its control's into account."""
        x = min(max(difference, -LARGEST_DIFFERENCE), LARGEST_DIFFERENCE)
        x = x / (2.0 * LARGEST_DIFFERENCE) + 0.5
        n = self.windows + 1
        variance = (0.25 + self.squares) / n
        bet = min(math.sqrt(2.0 * math.log(1.0 / self.alpha) / (variance * n * math.log1p(n))), 0.5)
        guess = (0.5 + self.total) / n
        mean = (0.5 + self.total + x) / (n + 1)
        return HarmTest(
            windows=n,
            total=self.total + x,
            squares=self.squares + (x - mean) ** 2,
            bets=self.bets + bet,
            bets_total=self.bets_total + bet * x,
            penalty=self.penalty + (x - guess) ** 2 * (-math.log1p(-bet) - bet),
            alpha=self.alpha,
        )

    @property
    def mean(self) -> float:
        """Mean difference so far, 0 before any."""
        return _difference(self.total / self.windows) if self.windows else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper bound of the true mean difference, each valid on its own at alpha."""
        if self.windows == 0:
            return -LARGEST_DIFFERENCE, LARGEST_DIFFERENCE
        centre = self.bets_total / self.bets
        width = (math.log(1.0 / self.alpha) + self.penalty) / self.bets
        return _difference(max(centre - width, 0.0)), _difference(min(centre + width, 1.0))


def _difference(x: float) -> float:
    return (x - 0.5) * 2.0 * LARGEST_DIFFERENCE
