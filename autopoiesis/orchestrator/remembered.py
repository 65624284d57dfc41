"""What must be remembered of a window until it settles."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from autopoiesis.arms.allocation import Allocation, Cell


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
    before: str = ""
    """The arm that led the window before; empty if there was none."""
    worth: dict[str, float] = field(default_factory=dict[str, float])
    """Utility of each arm in the long run, as told when the window ended."""

    def to_plain(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        cells = [[c.arm_id, c.replicas, c.shards, c.propensity] for c in self.allocation.cells]
        return {
            "window": self.allocation.window,
            "cells": cells,
            "vector": self.vector.tolist(),
            "bounds_s": [self.started_s, self.ended_s],
            "context": self.context,
            "before": self.before,
            "worth": self.worth,
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Self:
        """Read what `to_plain` gave."""
        cells = tuple(Cell(a, tuple(r), tuple(s), p) for a, r, s, p in plain["cells"])
        vector = np.array(plain["vector"], np.float64)
        started_s, ended_s = plain["bounds_s"]
        return cls(
            Allocation(plain["window"], cells),
            vector,
            started_s,
            ended_s,
            plain["context"],
            plain.get("before", ""),
            plain.get("worth", {}),
        )
