"""What the loop asks the twin after every window: each arm's word on it, and what a split costs.

The number of simulated requests per window is bounded; arms that played come first.
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from autopoiesis.arms.allocation import Allocation
from autopoiesis.arms.arm import State
from autopoiesis.arms.objective import Objective
from autopoiesis.arms.registry import Registry
from autopoiesis.orchestrator.observation import Observation
from autopoiesis.orchestrator.rehearsal import STRESS, STRESS_WEIGHT, Rehearsal, affordable
from autopoiesis.orchestrator.remembered import Remembered
from autopoiesis.orchestrator.rerun import stages
from autopoiesis.orchestrator.reward import Judged

REHEARSALS = 9
"""Replays per arm and window: when it has ended and when it settles, and two long ones, each worth three and a half."""
SHADOW_REPLAYS = 5
"""The same per arm in shadow: a window, and a long one."""

LONG_SHARE = 0.5
"""Share of the long run in what is expected of an arm; the other half is what a window said of it."""

Word = dict[str, Judged]
"""What the twin says of a window: its requests as each arm would have served them on the whole fleet."""


def utilities_of(word: Word) -> dict[str, float]:
    """Return each arm's mean utility, where any request counts."""
    return {arm: u for arm, judged in word.items() if (u := judged.mean_utility()) is not None}


def lean_of(worth: Mapping[str, float], values: Mapping[str, float]) -> dict[str, float]:
    """Return what the long run adds to what each arm is said to earn in a window, all against the arms' mean."""
    told = [arm for arm in values if arm in worth]
    more = LONG_SHARE * np.array([worth[arm] - values[arm] for arm in told])
    return dict(zip(told, (more - more.mean()).tolist(), strict=True)) if told else {}


def advantages(utility: Mapping[str, float]) -> dict[str, float]:
    """Return how much more than the arms' mean each of them has."""
    mean = float(np.mean([*utility.values()])) if utility else 0.0
    return {arm: u - mean for arm, u in utility.items()}


def word_of(said: Mapping[str, float], worth: Mapping[str, float]) -> dict[str, float]:
    """Return the advantage that a window and the long run together tell of each arm."""
    lean = lean_of(worth, said)
    return {arm: u + lean[arm] for arm, u in advantages(said).items() if arm in lean}


class Replays:
    """Replays windows within a budget."""

    def __init__(
        self, registry: Registry, objective: Objective, seed: int, most_requests: int, twin: bool
    ) -> None:
        self._registry = registry
        self._objective = objective
        self._seed = seed
        self._most_requests = most_requests
        self._twin = twin

    def word(
        self,
        of: Remembered,
        seen: Observation,
        played: Collection[str],
        mean: Mapping[str, float],
    ) -> Word:
        """Replay the window under as many arms as can be afforded: those that played, then the best by `mean`."""
        rehearsal = self._rehearsal(of, seen)
        requests = rehearsal.requests()
        if not self._twin or not requests:
            return {}
        known = {*(a.id for a in self._registry.serving()), *played}
        order = sorted(known, key=lambda a: (a not in played, -mean.get(a, 0.0), a))
        arms = affordable(order, REHEARSALS * requests, self._most_requests)
        programs = {arm: self._registry.program(arm) for arm in arms}
        return rehearsal.under(programs)

    def worth(self, of: Remembered, seen: Observation, arms: Collection[str]) -> dict[str, float]:
        """Return each arm's utility in the long run; where that is equal, more load decides.

        A window begins with the backlog of whoever served before, and ends before an arm's own is felt.
        """
        rehearsal = self._rehearsal(of, seen)
        programs = {arm: self._registry.program(arm) for arm in arms}
        long = rehearsal.in_the_long_run(programs)
        stressed = rehearsal.in_the_long_run(programs, STRESS)
        usual = float(np.mean([*stressed.values()])) if stressed else 0.0
        return {
            a: u + STRESS_WEIGHT * (stressed[a] - usual) for a, u in long.items() if a in stressed
        }

    def split_cost(
        self, of: Remembered, seen: Observation, cells: Allocation, word: Word
    ) -> float | None:
        """Return the utility that it costs to give one of these cells to itself, None where nobody knows.

        The arm that serves most plays on both sides, so that what is lost is lost by the split.
        """
        if len(cells.cells) < 2:
            return None
        arm = max(cells.arms(), key=cells.share)
        whole = word[arm].mean_utility() if arm in word else None
        index = {r.name: i for i, r in enumerate(seen.replicas)}
        first, rest = cells.cells[0], cells.cells[1:]
        sides = [
            (tuple(index[r] for c in side for r in c.replicas if r in index),
             tuple(s for c in side for s in c.shards))
            for side in ((first,), rest)
        ]  # fmt: skip
        if whole is None or not all(replicas for replicas, _ in sides):
            return None
        program = self._registry.program(arm)
        split = self._rehearsal(of, seen).split(program, sides).mean_utility()
        return None if split is None else whole - split

    def in_shadow(
        self, of: Remembered, seen: Observation, arms: Sequence[str]
    ) -> tuple[Word, dict[str, float]]:
        """Let arms in shadow decide the window beside the arm that served most of it, which comes first.

        Beside what they make of the window stands what they are worth in the long run.
        """
        live = max(of.allocation.arms(), key=of.allocation.share)
        rehearsal = self._rehearsal(of, seen)
        requests = rehearsal.requests()
        if not requests:
            return {}, {}
        each = SHADOW_REPLAYS * requests
        tried = (live, *affordable(arms, each, self._most_requests - each))
        programs = {arm: self._registry.program(arm) for arm in tried}
        return rehearsal.under(programs), rehearsal.in_the_long_run(programs)

    def shadows(self) -> list[str]:
        """Return the arms in shadow."""
        return [a.id for a in self._registry.fast() if a.state is State.SHADOW]

    def _rehearsal(self, of: Remembered, seen: Observation) -> Rehearsal:
        before = stages(of.earlier, self._registry, seen.replicas)
        return Rehearsal(seen, of.started_s, of.ended_s, self._objective, self._seed, before)
