"""The wall clock may be set, back or forth, while windows run; waiting goes by a clock that nobody sets."""

import time
from typing import NamedTuple

SLACK_S = 1.0
"""Less is no setting of the clock: it is corrected all the time, and two clocks are read one after the other."""


class Moment(NamedTuple):
    """A moment by both clocks."""

    wall_s: float
    """Unix time [s]."""
    steady_s: float
    """Never set back; its zero means nothing [s]."""

    @classmethod
    def now(cls) -> "Moment":
        """Return this moment."""
        return cls(time.time(), time.monotonic())


def set_between(earlier: Moment, later: Moment) -> float:
    """Return by how much the wall clock was set between two moments [s]; 0 if it was not."""
    by_s = (later.wall_s - earlier.wall_s) - (later.steady_s - earlier.steady_s)
    return by_s if abs(by_s) > SLACK_S else 0.0
