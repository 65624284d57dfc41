"""What the twin foresees of each arm: its words on the newest windows, averaged.

One window's word is of that window's traffic and says little of the next one's: bursts come and go
faster than arms can be changed. Averaged over a few windows it is the better forecast.
"""

from collections.abc import Mapping, Sequence
from typing import Any

KEEP = 0.6
"""What is left of an older word's say after a window."""


class Foresight:
    """The moving average of the words on each arm; one that is new is judged by those that there are."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def take_in(self, word: Mapping[str, float]) -> dict[str, float]:
        """Hear another window's word; return the advantage foreseen of each arm that it speaks of."""
        heard = {arm: self._sums.get(arm, (0.0, 0.0)) for arm in word}
        self._sums = {a: (t * KEEP + word[a], w * KEEP + 1.0) for a, (t, w) in heard.items()}
        return {arm: total / weight for arm, (total, weight) in self._sums.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the state as plain numbers."""
        return {arm: list(sums) for arm, sums in self._sums.items()}

    def restore(self, state: Mapping[str, Sequence[float]]) -> None:
        """Take over what `to_dict` gave."""
        self._sums = {arm: (total, weight) for arm, (total, weight) in state.items()}
