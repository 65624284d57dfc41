"""What a policy does to a fleet, in four numbers: what it is like, whatever it earns."""

from typing import NamedTuple

import numpy as np

from autopoiesis.arms.objective import Objective
from autopoiesis.twin.outcome import Outcome, Status

EDGES = ((0.05, 0.15, 0.4), (0.1, 0.3, 0.6), (0.001, 0.03, 0.2), (0.01, 0.1, 0.5))
"""Bounds between the cells, for each of the numbers."""

Cell = tuple[int, int, int, int]
"""Which part of the space of behaviours a policy is in."""


class Behaviour(NamedTuple):
    """Measured in the twin, over the requests that count."""

    concentration: float
    """Requests at the busiest replica beyond its even share, 0 even, 1 all of them there."""
    prefix_hits: float
    """Share of the prompt tokens that the replica had cached."""
    shed: float
    """Share of the requests refused."""
    hold: float
    """Mean time held at the gateway before dispatch, in units of the objective for the first token."""

    def cell(self) -> Cell:
        """Return the cell of the archive that it belongs to."""
        a, b, c, d = (
            int(np.searchsorted(edges, value, side="right"))
            for edges, value in zip(EDGES, self, strict=True)
        )
        return a, b, c, d


def behaviour_of(outcome: Outcome, objective: Objective, replicas: int) -> Behaviour:
    """Describe what became of requests on a fleet of `replicas`; all 0 where there are none."""
    sent = outcome.select(outcome.replica >= 0)
    n, m = len(outcome.status), len(sent.status)
    if not m:
        return Behaviour(0.0, 0.0, 1.0 if n else 0.0, 0.0)
    even = 1.0 / replicas
    busiest = float(np.bincount(sent.replica, minlength=replicas).max()) / m
    return Behaviour(
        concentration=(busiest - even) / (1.0 - even) if replicas > 1 else 0.0,
        prefix_hits=float(sent.cached_tokens.sum() / max(int(sent.input_tokens.sum()), 1)),
        shed=float((outcome.status == Status.SHED).mean()),
        hold=float(np.mean(sent.dispatched_s - sent.arrival_s)) / objective.slo_ttft_s,
    )


def mean_behaviour(several: list[Behaviour]) -> Behaviour:
    """Return the mean over replays."""
    return Behaviour(*np.mean(several, axis=0).tolist())
