"""What must be remembered of a window until it settles."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from autopoiesis.arms.allocation import Allocation, Cell

EARLIER = 8
"""Windows before one of which is remembered who served: who holds what it began with, and the warm-up of its replay."""


@dataclass(slots=True)
class Remembered:
    """One window: who served, and under which context that was decided."""

    allocation: Allocation
    vector: NDArray[np.float64]
    """The standardised context under which it was decided."""
    started_s: float = 0.0
    ended_s: float = 0.0
    """0 while it runs."""
    context: dict[str, float] = field(default_factory=dict[str, float])
    """What it turned out to be like."""
    earlier: tuple[tuple[float, Allocation], ...] = ()
    """Who served the windows before, in order, and from when on."""
    worth: dict[str, float] = field(default_factory=dict[str, float])
    """Utility of each arm in the long run, as told when the window ended."""

    def to_plain(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {
            "window": self.allocation.window,
            "cells": _cells_to_plain(self.allocation),
            "vector": self.vector.tolist(),
            "bounds_s": [self.started_s, self.ended_s],
            "context": self.context,
            "earlier": [[at_s, a.window, _cells_to_plain(a)] for at_s, a in self.earlier],
            "worth": self.worth,
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Self:
        """Read what `to_plain` gave."""
        vector = np.array(plain["vector"], np.float64)
        started_s, ended_s = plain["bounds_s"]
        return cls(
            _from_plain(plain["window"], plain["cells"]),
            vector,
            started_s,
            ended_s,
            plain["context"],
            tuple((at_s, _from_plain(w, cells)) for at_s, w, cells in plain.get("earlier", [])),
            plain.get("worth", {}),
        )

    def follow_clock(self, by_s: float) -> None:
        """Move its times: the clock was set by so much."""
        if self.ended_s > 0.0:
            self.started_s += by_s
            self.ended_s += by_s
        self.earlier = tuple((at_s + by_s, allocation) for at_s, allocation in self.earlier)

    def followed(self) -> tuple[tuple[float, Allocation], ...]:
        """Return who served up to its end, for the window after it."""
        return (*self.earlier, (self.started_s, self.allocation))[-EARLIER:]


def _cells_to_plain(allocation: Allocation) -> list[list[Any]]:
    return [[c.arm_id, c.replicas, c.shards, c.propensity] for c in allocation.cells]


def _from_plain(window: int, cells: Sequence[Sequence[Any]]) -> Allocation:
    return Allocation(window, tuple(Cell(a, tuple(r), tuple(s), p) for a, r, s, p in cells))
