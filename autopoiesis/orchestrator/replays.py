"""What the loop asks the twin after every window: each arm's word on it, and what a split costs.

The number of simulated requests per window is bounded; arms that played come first.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from autopoiesis.arms.allocation import Allocation
from autopoiesis.arms.arm import State
from autopoiesis.arms.objective import Objective
from autopoiesis.arms.registry import Registry
from autopoiesis.orchestrator.observation import Observation
from autopoiesis.orchestrator.rehearsal import Rehearsal, affordable
from autopoiesis.orchestrator.remembered import Remembered
from autopoiesis.orchestrator.reward import Judged

REHEARSALS = 4
"""Replays per arm and window: when it has ended and when it settles, each also under stress."""


class Word(NamedTuple):
    """What the twin says of a window."""

    judged: dict[str, Judged]
    """Its requests as each arm would have served them on the whole fleet."""
    lean: dict[str, float]
    """By how much to prefer each arm for what it would do under more load."""

    def utilities(self) -> dict[str, float]:
        """Return each arm's mean utility, where any request counts."""
        return {a: u for a, j in self.judged.items() if (u := j.mean_utility()) is not None}


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
            return Word({}, {})
        known = {*(a.id for a in self._registry.serving()), *played}
        order = sorted(known, key=lambda a: (a not in played, -mean.get(a, 0.0), a))
        arms = affordable(order, REHEARSALS * requests, self._most_requests)
        programs = {arm: self._registry.program(arm) for arm in arms}
        return Word(rehearsal.under(programs), rehearsal.lean(programs))

    def split_cost(
        self, of: Remembered, seen: Observation, cells: Allocation, word: Word
    ) -> float | None:
        """Return the utility that it costs to give one of these cells to itself, None where nobody knows.

        The arm that serves most plays on both sides, so that what is lost is lost by the split.
        """
        if len(cells.cells) < 2:
            return None
        arm = max(cells.arms(), key=cells.share)
        whole = word.judged[arm].mean_utility() if arm in word.judged else None
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
    ) -> dict[str, Judged]:
        """Let arms in shadow decide the window beside the arm that served most of it, which comes first."""
        live = max(of.allocation.arms(), key=of.allocation.share)
        rehearsal = self._rehearsal(of, seen)
        requests = rehearsal.requests()
        if not requests:
            return {}
        tried = (live, *affordable(arms, requests, self._most_requests - requests))
        return rehearsal.under({arm: self._registry.program(arm) for arm in tried})

    def shadows(self) -> list[str]:
        """Return the arms in shadow."""
        return [a.id for a in self._registry.fast() if a.state is State.SHADOW]

    def _rehearsal(self, of: Remembered, seen: Observation) -> Rehearsal:
        return Rehearsal(seen, of.started_s, of.ended_s, self._objective, self._seed)
