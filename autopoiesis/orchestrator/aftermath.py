"""What an arm leaves behind: the backlog of one window is paid for by the requests of the next.

A window's own utility does not show that. An arm that lets everybody wait looks no worse than one that
refuses some, until the load falls and one of them has a queue to work off. So the twin goes
on after the window, with a quarter of its requests once more, and sees how those fare.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from autopoiesis.arms.machine import Program
from autopoiesis.arms.objective import Objective
from autopoiesis.orchestrator.rerun import replay_each
from autopoiesis.twin.composition import splice
from autopoiesis.twin.simulation import ReplicaSpec
from autopoiesis.twin.trace import Trace

EVERY = 4
"""Every so many-th request of the window comes once more: a load that most fleets would recover under."""
DECISIVE = 0.05
"""Differences that count; smaller ones are no backlog but chance."""


def aftermath(
    trace: Trace,
    replicas: Sequence[ReplicaSpec],
    programs: Mapping[str, Program],
    objective: Objective,
    seed: int,
    window_s: tuple[float, float, float],
) -> dict[str, float]:
    """Return each arm's mean utility of the requests that come after the window, less the arms' mean.

    `window_s` are the times where the warm-up and the window begin and where the window ends. Empty
    where nothing comes or nothing differs.
    """
    warm_s, started_s, ended_s = window_s
    before = trace.slice(warm_s, ended_s)
    again = trace.slice(started_s, ended_s)
    again = again.select(np.arange(0, len(again), EVERY))
    if not len(again):
        return {}
    both = splice([before, again], trace.name)
    began_s = float(both.arrival_s[len(before)])
    end_s = began_s + 2.0 * (ended_s - started_s)
    bounds_s = 0.0, began_s, end_s, end_s
    judged = replay_each(both, replicas, programs, objective, bounds_s, seed)
    utility = {arm: u for arm, j in judged.items() if (u := j.mean_utility()) is not None}
    mean = float(np.mean([*utility.values()])) if utility else 0.0
    if not utility or max(utility.values()) - min(utility.values()) < DECISIVE:
        return {}
    return {arm: value - mean for arm, value in utility.items()}
