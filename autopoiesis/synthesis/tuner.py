"""The proposer that leaves structure alone: it turns the numbers of the policies it is shown.

It is what evolution has to beat: the best arm there is, tuned with the same budget.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np

from autopoiesis.arms.arm import Origin, arm_id
from autopoiesis.arms.language import verify
from autopoiesis.arms.slow import verify_slow
from autopoiesis.synthesis.brief import Brief
from autopoiesis.synthesis.proposer import Account, Parent, Proposal, joined
from autopoiesis.synthesis.race import Cell, Course, OutOfTime, race_cells
from autopoiesis.synthesis.tuning import tune
from autopoiesis.telemetry.records import CandidateRow

SHARE = 0.5
"""Share of the cycle's budget after which it tunes no further: the gates need the rest."""
RUNS = 3
"""Times that one policy may be tuned, each from another seed."""


class TuningProposer:
    """Tunes its parents, the best first, each of them a few times."""

    origin = Origin.TUNED
    account = Account()

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began_s: float | None = None
        self._runs: dict[str, int] = {}
        self._made: set[str] = set()

    def propose(
        self, brief: Brief, parents: Sequence[Parent], n: int, rng: np.random.Generator
    ) -> list[Proposal]:
        """Return the best parent that may still be tuned with the best numbers found for it."""
        if self._began_s is None:
            self._began_s = self._clock()
        until_s = self._began_s + SHARE * brief.budget_s

        def in_time() -> None:
            if self._clock() >= until_s:
                raise OutOfTime

        unsandboxed = brief.allow_unsandboxed
        course = Course(
            brief.replicas, brief.objective, in_time, brief.yards, allow_unsandboxed=unsandboxed
        )
        try:
            return self._tuned(parents, course, race_cells(brief), until_s, rng)[:n]
        finally:
            course.close()

    def _tuned(
        self,
        parents: Sequence[Parent],
        course: Course,
        cells: Sequence[Cell],
        until_s: float,
        rng: np.random.Generator,
    ) -> list[Proposal]:
        for parent in parents:
            while self._runs.get(parent.id, 0) < RUNS and parent.id not in self._made:
                if self._clock() >= until_s:
                    return []
                self._runs[parent.id] = self._runs.get(parent.id, 0) + 1
                slow = verify_slow(parent.slow) if parent.slow else None
                found = tune(verify(parent.source), course, cells, rng, slow=slow)
                made = arm_id(found.policy.id, slow.id if slow else "")
                if made == parent.id or made in self._made:
                    continue
                self._made.add(made)
                thought = f"the numbers of {parent.name} tuned in {found.replays} replays"
                source = joined(found.policy.source, parent.slow)
                return [Proposal(source, self.origin, (parent.id,), thought)]
        return []

    def learn(self, verdicts: Sequence[tuple[Proposal, CandidateRow]]) -> None:
        """It keeps nothing from one cycle to the next."""
