"""A settled window once more, in the twin: under every arm, on the whole fleet, with paired seeds.

The windows before it are the warm-up, under those who served then. It begins with the backlog that there
really was: requests that had arrived and not finished, each as far as it was. A second rehearsal under
more load tells which arm would hold if the load rose; it decides where arms are equal, as they are while
load is low.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from autopoiesis.arms.machine import Program
from autopoiesis.arms.objective import Objective
from autopoiesis.orchestrator.observation import Observation, unfinished
from autopoiesis.orchestrator.rerun import Stage, replay_each, replay_under
from autopoiesis.orchestrator.reward import Judged, paces
from autopoiesis.twin.backlog import Backlog
from autopoiesis.twin.composition import going_on
from autopoiesis.twin.outcome import Status
from autopoiesis.twin.python_policy import PythonPolicy
from autopoiesis.twin.simulation import SimCell, shards
from autopoiesis.twin.trace import Trace

WARMUP_WINDOWS = 2
"""Windows that are replayed before the one that counts."""
STRESS = 2.0
"""Speed of the long run under more load."""
STRESS_WEIGHT = 0.05
"""Weight of its differences between arms."""
LONG_WINDOWS = 6
"""Windows over which is told what an arm makes of the traffic when its own backlog is all there is."""
LONG_KEEP = 0.8
"""What is left of an older window's say in that."""
LONG_WARM_UP = 3
"""Windows before those, in which caches fill."""
GOES_ON = 3
"""Times that the newest window's traffic comes again in that; all but the last time count."""


@dataclass(frozen=True, eq=False)
class Rehearsal:
    """What there is to replay of one window."""

    seen: Observation
    started_s: float
    ended_s: float
    objective: Objective
    seed: int
    before: tuple[Stage, ...] = ()
    """Who served the windows before, in order; they serve in the warm-up. None: whoever serves the window."""

    @property
    def warm_s(self) -> float:
        """When the warm-up begins."""
        return self._begin(self.started_s - WARMUP_WINDOWS * (self.ended_s - self.started_s))

    def _begin(self, wanted_s: float) -> float:
        """Return when to begin: as wanted, but not before the first request, and no later than the window."""
        arrival_s = self.seen.trace.arrival_s
        first_s = float(arrival_s[0]) if len(arrival_s) else self.started_s
        return max(wanted_s, min(first_s, self.started_s))

    def requests(self) -> int:
        """Return how many requests one replay takes; 0 if the window has none or no replica."""
        counted = np.searchsorted(self.seen.trace.arrival_s, [self.started_s, self.ended_s])
        return len(self._replayed[0]) if counted[0] < counted[1] and self.seen.replicas else 0

    @cached_property
    def _replayed(self) -> tuple[Trace, Backlog]:
        """What is replayed: the backlog at the start of the warm-up, then what arrived since."""
        trace, backlog = self._since(self.warm_s)
        shard = shards(trace)
        holders: list[Program | PythonPolicy] = []
        for i in np.flatnonzero((trace.arrival_s < self.warm_s) & (backlog.replica < 0)).tolist():
            holder = self._served(float(trace.arrival_s[i]), int(shard[i]))
            if holder is not None:
                backlog.held_by[i] = len(holders)
                holders.append(holder)
        return trace, backlog._replace(holders=tuple(holders))

    def _served(self, at_s: float, shard: int) -> Program | PythonPolicy | None:
        """Return who served a shard at a time before the window: who held a request then holds it still."""
        stages = [stage for stage in self.before if stage.began_s <= at_s]
        cells = stages[-1].cells if stages else ()
        return next((cell.program for cell in cells if shard in cell.shards), None)

    def _since(self, warm_s: float) -> tuple[Trace, Backlog]:
        """Return the backlog at a time and what has arrived since, and how far that backlog was.

        How many tokens of a stream were out is told by its pace.
        """
        outcome = self.seen.outcome
        rows = np.flatnonzero(unfinished(outcome, warm_s) & (outcome.arrival_s < self.seen.ended_s))
        trace, outcome = self.seen.trace.select(rows), outcome.select(rows)
        replica = np.where(outcome.dispatched_s < warm_s, outcome.replica, -1)
        generating = (outcome.first_token_s < warm_s) & (replica >= 0)
        pace_s = np.where(
            outcome.status == Status.COMPLETED,
            outcome.tpot_s,
            paces(outcome, self.started_s, self.seen.ended_s),
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            later = np.nan_to_num((warm_s - outcome.first_token_s) / pace_s, posinf=0.0)
        most = np.maximum(trace.output_tokens - 1, 1)
        generated = np.where(generating, np.clip(1.0 + np.floor(later), 1, most), 0)
        generated = generated.astype(np.int64)
        trace = replace(trace, output_tokens=np.maximum(trace.output_tokens, generated + 1))
        backlog = Backlog(replica, generated, outcome.first_token_s, np.full(len(trace), -1))
        return trace, backlog

    def under(self, programs: Mapping[str, Program]) -> dict[str, Judged]:
        """Return the window's requests as each arm serves them."""
        return replay_each(
            *self._replayed,
            self.seen.replicas,
            programs,
            self.objective,
            self._bounds_s,
            self.seed,
            before=self._warming,
        )

    def split(
        self, program: Program, sides: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
    ) -> Judged:
        """Return the window's requests as one arm serves them on a fleet that is split.

        `sides` are the replicas, by index, and the shards of each part.
        """
        cells = [
            SimCell(_unlike(program, i), replicas, own) for i, (replicas, own) in enumerate(sides)
        ]
        return replay_under(
            *self._replayed,
            self.seen.replicas,
            cells,
            self.objective,
            self._bounds_s,
            self.seed,
            before=self._warming,
        )

    @property
    def _warming(self) -> tuple[Stage, ...]:
        """Who serves in the warm-up: from the stage on that was under way when it begins."""
        stages = [stage for stage in self.before if stage.began_s < self.started_s]
        under_way = [i for i, stage in enumerate(stages) if stage.began_s <= self.warm_s]
        return tuple(stages[max(under_way, default=0) :])

    @property
    def _bounds_s(self) -> tuple[float, float, float, float]:
        return self.warm_s, self.started_s, self.ended_s, self.seen.ended_s

    def in_the_long_run(
        self, programs: Mapping[str, Program], speed: float = 1.0
    ) -> dict[str, float]:
        """Return each arm's mean utility had it served alone for `LONG_WINDOWS`, and if it went on like that.

        The newest window's traffic comes again `GOES_ON` times, so that what runs now ends under the load that
        there is. With a `speed` all requests come that many times as fast. Older windows count less.
        """
        length_s = self.ended_s - self.started_s
        began_s = self._begin(self.ended_s - LONG_WINDOWS * length_s)
        warm_s = self._begin(self.ended_s - (LONG_WINDOWS + LONG_WARM_UP) * length_s)
        past, queued = self._since(warm_s)
        trace = going_on(past, self.started_s, self.ended_s, GOES_ON)
        known = len(past.until(self.ended_s))
        queued = queued.resized(known).resized(len(trace))
        counted_s = self.ended_s + (GOES_ON - 1) * length_s
        judged = replay_each(
            trace,
            queued,
            self.seen.replicas,
            programs,
            self.objective,
            (warm_s, began_s, counted_s, self.ended_s + GOES_ON * length_s),
            self.seed,
            speed,
        )
        return {
            arm: u
            for arm, j in judged.items()
            if (u := _recent_utility(j, length_s / speed, GOES_ON - 1)) is not None
        }


def _unlike(program: Program, number: int) -> Program:
    """Return a program that decides alike and counts as another one: cells of equal ones are pooled."""
    return program._replace(registers=np.append(program.registers, float(number)))


def _recent_utility(judged: Judged, window_s: float, newest: int) -> float | None:
    """Return the mean utility; the last `newest` windows count in full, each before them less."""
    age = np.floor((judged.ended_s - judged.outcome.arrival_s) / window_s) - newest
    weights = np.where(judged.counts, LONG_KEEP ** np.maximum(age, 0.0), 0.0)
    return float(np.average(judged.utility, weights=weights)) if weights.any() else None


def affordable(arms: Sequence[str], requests: int, most_requests: int) -> Sequence[str]:
    """Return the first arms whose replays fit into `most_requests` simulated ones, at least one."""
    return arms[: max(1, most_requests // max(requests, 1))]
