"""A settled window once more, in the twin: under every arm, on the whole fleet, with paired seeds.

The windows before it are the warm-up, which begins with the backlog that there really was: requests
that had arrived and not finished. A second rehearsal under more load tells which arm would hold
if the load rose; it decides where arms are equal, as they are while load is low.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from autopoiesis.arms.machine import Program
from autopoiesis.arms.objective import Objective
from autopoiesis.orchestrator.aftermath import aftermath
from autopoiesis.orchestrator.observation import Observation, unfinished
from autopoiesis.orchestrator.rerun import replay_each, replay_under
from autopoiesis.orchestrator.reward import Judged
from autopoiesis.twin.simulation import SimCell
from autopoiesis.twin.trace import Trace

WARMUP_WINDOWS = 2
"""Windows that are replayed before the one that counts."""
STRESS = 1.5
"""Speed of the rehearsal under more load."""
STRESS_WEIGHT = 0.1
"""Weight of its differences between arms."""
AFTERMATH_WEIGHT = 1.0
"""Weight of what an arm's backlog does to the requests of the next window."""


@dataclass(frozen=True, eq=False)
class Rehearsal:
    """What there is to replay of one window."""

    seen: Observation
    started_s: float
    ended_s: float
    objective: Objective
    seed: int

    @property
    def warm_s(self) -> float:
        """When the warm-up begins."""
        arrival_s = self.seen.trace.arrival_s
        first_s = float(arrival_s[0]) if len(arrival_s) else self.started_s
        return max(self.started_s - WARMUP_WINDOWS * (self.ended_s - self.started_s), first_s)

    def requests(self) -> int:
        """Return how many requests one replay takes; 0 if the window has none or no replica."""
        counted = np.searchsorted(self.seen.trace.arrival_s, [self.started_s, self.ended_s])
        return len(self._replayed) if counted[0] < counted[1] and self.seen.replicas else 0

    @cached_property
    def _replayed(self) -> Trace:
        """What is replayed: the backlog at the start of the warm-up, then what arrived since."""
        outcome, warm_s = self.seen.outcome, self.warm_s
        rows = np.flatnonzero(unfinished(outcome, warm_s) & (outcome.arrival_s < self.seen.ended_s))
        trace, outcome = self.seen.trace.select(rows), outcome.select(rows)
        # What was already generated is not generated again; the prompt is recomputed.
        generating = outcome.first_token_s < warm_s
        took_s = np.maximum(outcome.finished_s - outcome.first_token_s, 1e-9)
        left = np.where(generating, (outcome.finished_s - warm_s) / took_s, 1.0)
        tokens = np.rint(trace.output_tokens * np.nan_to_num(left, nan=1.0))
        return replace(
            trace,
            arrival_s=np.maximum(trace.arrival_s, warm_s),
            output_tokens=np.maximum(tokens, 1).astype(np.int64),
        )

    def under(self, programs: Mapping[str, Program], speed: float = 1.0) -> dict[str, Judged]:
        """Return the window's requests as each arm serves them, with `speed` times the load."""
        return replay_each(
            self._replayed,
            self.seen.replicas,
            programs,
            self.objective,
            self._bounds_s,
            self.seed,
            speed,
        )

    def split(
        self, program: Program, sides: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
    ) -> Judged:
        """Return the window's requests as one arm serves them on a fleet that is split.

        `sides` are the replicas, by index, and the shards of each part.
        """
        cells = [
            SimCell(_unlike(program, i), replicas, shards)
            for i, (replicas, shards) in enumerate(sides)
        ]
        return replay_under(
            self._replayed, self.seen.replicas, cells, self.objective, self._bounds_s, self.seed
        )

    @property
    def _bounds_s(self) -> tuple[float, float, float, float]:
        return self.warm_s, self.started_s, self.ended_s, self.seen.ended_s

    def lean(self, programs: Mapping[str, Program]) -> dict[str, float]:
        """Return by how much to prefer each arm for what it would do under more load, and leaves behind."""
        stressed = self.under(programs, STRESS)
        utility = {a: u for a, j in stressed.items() if (u := j.mean_utility()) is not None}
        mean = float(np.mean([*utility.values()])) if utility else 0.0
        after = aftermath(
            self._replayed,
            self.seen.replicas,
            programs,
            self.objective,
            self.seed,
            self._bounds_s[:3],
        )
        return {
            arm: STRESS_WEIGHT * (u - mean) + AFTERMATH_WEIGHT * after.get(arm, 0.0)
            for arm, u in utility.items()
        }


def _unlike(program: Program, number: int) -> Program:
    """Return a program that decides alike and counts as another one: cells of equal ones are pooled."""
    return program._replace(registers=np.append(program.registers, float(number)))


def affordable(arms: Sequence[str], requests: int, most_requests: int) -> Sequence[str]:
    """Return the first arms whose replays fit into `most_requests` simulated ones, at least one."""
    return arms[: max(1, most_requests // max(requests, 1))]
