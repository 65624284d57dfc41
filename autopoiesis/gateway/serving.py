"""An arm at work: its program on its replicas, and what becomes of one that fails."""

import logging
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopoiesis.arms import fleet
from autopoiesis.arms.fleet import Group
from autopoiesis.arms.machine import CEILING, Program

log = logging.getLogger(__name__)

MOST_FAULTS = 3
"""Decisions in which an arm may fail before the baseline takes its place."""

Indexes = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ServingArm:
    """An arm with the replicas that it governs now."""

    arm_id: str
    program: Program
    registers: Floats
    group: Group


def serving(
    arm_id: str, program: Program, members: Indexes, share: float, counters: Floats | None = None
) -> ServingArm:
    """Put an arm to work on replicas that have this share of the traffic; `counters` go on."""
    group = fleet.group_of(members, share)
    if counters is not None:
        group.counters[:] = counters
    return ServingArm(arm_id, program, program.registers.copy(), group)


def stand_in(baseline: ServingArm, arm: ServingArm) -> ServingArm:
    """Return the baseline in another arm's place, on its replicas; it holds nothing back there."""
    entry = baseline.program.entry.copy()
    entry[CEILING] = -1
    program = baseline.program._replace(entry=entry)
    return ServingArm(baseline.arm_id, program, baseline.registers, arm.group)


class NonsenseError(ValueError):
    """An arm's answer means nothing; the message says what it was."""


class Faults:
    """Counts the decisions in which arms fail."""

    def __init__(self) -> None:
        self.untold: Counter[tuple[str, str]] = Counter()
        """By arm and message, since they were last told to the controller."""
        self._under_this_allocation: Counter[str] = Counter()

    def note(self, arm_id: str, message: str) -> None:
        """Note what went wrong; `arm_id` is empty if no arm had a part in it."""
        self.untold[arm_id, message] += 1

    def count(self, arm_id: str, error: Exception) -> bool:
        """Count a decision that failed; tell whether it was the one too many."""
        nonsense = isinstance(error, NonsenseError)
        told = (str(error) if nonsense else f"{type(error).__name__}: {error}")[:200]
        if not self.untold[arm_id, told]:
            log.warning("Arm %s failed: %s", arm_id, told, exc_info=None if nonsense else error)
        self.note(arm_id, told)
        self._under_this_allocation[arm_id] += 1
        return self._under_this_allocation[arm_id] == MOST_FAULTS

    def too_many(self, arm_id: str) -> bool:
        """Tell whether the baseline has taken the arm's place."""
        return self._under_this_allocation[arm_id] >= MOST_FAULTS

    def new_allocation(self) -> None:
        """Give every arm a new chance."""
        self._under_this_allocation.clear()
