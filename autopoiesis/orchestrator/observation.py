"""What the window loop is shown: recent requests as columns, whether they were live or simulated."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopoiesis.twin.capacity import ReplicaSpec
from autopoiesis.twin.outcome import LOST, Outcome
from autopoiesis.twin.outcome import Status as Ending
from autopoiesis.twin.trace import Trace


@dataclass(frozen=True, slots=True, eq=False)
class Observation:
    """What is known when a window has just ended. Rows of `trace` and `outcome` belong together."""

    window: int
    """The window that ended; the one before it settles now."""
    started_s: float
    ended_s: float
    trace: Trace
    """The requests that arrived in the last `loop.KEEP_WINDOWS` windows or were unfinished then."""
    outcome: Outcome
    """What had come of them at `ended_s`; `replica` counts within `replicas`, -1 for one that is not there."""
    replicas: tuple[ReplicaSpec, ...]
    """The fleet that served, as the twin models it."""


def unfinished(outcome: Outcome, at_s: float) -> NDArray[np.bool_]:
    """Tell which requests arrive after `at_s` or were in the fleet then, served or held."""
    refused = np.isin(outcome.status, (Ending.SHED, *LOST))
    return (outcome.arrival_s >= at_s) | ~(refused | (outcome.finished_s <= at_s))
