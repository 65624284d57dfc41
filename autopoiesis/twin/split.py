"""Which requests a profile is fitted to, and which it is compared on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopoiesis.twin.recorded import Recorded

Mask = NDArray[np.bool_]
Choice = Callable[[NDArray[np.float64]], Mask]
"""Times of arrival [s], shape (n,) → which of these requests, shape (n,)."""


@dataclass(frozen=True, slots=True)
class Split:
    """Requests to fit to, and others to compare on."""

    fitted: Choice
    compared: Choice


def everything(arrival_s: NDArray[np.float64]) -> Mask:
    """Choose all requests."""
    return np.ones(len(arrival_s), np.bool_)


def early_and_late(recordings: Sequence[Recorded], share: float) -> Split:
    """Fit to the first share of the time and compare on the rest; a ValueError unless 0 < share < 1."""
    if not 0.0 < share < 1.0:
        raise ValueError(f"the share to calibrate on must be between 0 and 1, not {share}")
    at_s = share * max(float(r.trace.arrival_s[-1]) for r in recordings)
    return Split(lambda arrival_s: arrival_s < at_s, lambda arrival_s: arrival_s >= at_s)


def in_turns(turn_s: float) -> Split:
    """Fit to every other stretch of time and compare on those between; a ValueError unless turn_s > 0.

    A machine that becomes slower or faster by itself then does so in both parts.
    """
    if not 0.0 < turn_s < np.inf:
        raise ValueError(f"a turn must last longer than 0 s, not {turn_s}")
    return Split(
        lambda arrival_s: arrival_s // turn_s % 2 == 0,
        lambda arrival_s: arrival_s // turn_s % 2 == 1,
    )
