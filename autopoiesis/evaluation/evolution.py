"""Evolution and tuning as contestants use them: the product's own cycle, in this process.

`step` and `tune` are what the synthesis worker runs; what differs is the clock (`effort`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from autopoiesis.arms.arm import Arm
from autopoiesis.arms.compiler import compile_policy
from autopoiesis.arms.language import verify
from autopoiesis.evaluation.effort import TICK_S, Effort, Spent, counting_clock
from autopoiesis.evaluation.scenario import Situation
from autopoiesis.orchestrator.growth import brief_of, promoted_with_gain
from autopoiesis.orchestrator.replay import Newcomer, Request
from autopoiesis.orchestrator.settings import Settings
from autopoiesis.orchestrator.triggers import Trigger
from autopoiesis.synthesis.archive import Archive, from_archive
from autopoiesis.synthesis.brief import Brief, BriefError
from autopoiesis.synthesis.genetic import GeneticProposer
from autopoiesis.synthesis.race import Course, Deadline, holdout_cells, race_cells
from autopoiesis.synthesis.step import step
from autopoiesis.synthesis.tuning import tune
from autopoiesis.telemetry.records import CandidateRow, SynthesisRow
from autopoiesis.twin.simulation import ReplicaSpec
from autopoiesis.twin.trace import Trace

BEFORE = Trigger("operator", 0, 0.0, "before the judged part begins")
TIME_STAMP = 0.0
"""When arms were made, for all: a real time would make results differ from run to run."""


def brief_on(
    situation: Situation,
    recent: Trace,
    replicas: Sequence[ReplicaSpec],
    arms: Sequence[Arm],
    replays: int,
    trigger: Trigger = BEFORE,
) -> Brief | None:
    """Ask for better policies as the controller does, within so many replays; None: too few requests."""
    settings = Settings.model_validate(
        {
            "window_s": situation.window_s,
            "slo_ttft_s": situation.objective.slo_ttft_s,
            "slo_tpot_s": situation.objective.slo_tpot_s,
            "late_worth": situation.objective.late_worth,
            "seed": situation.seed,
            "synthesis_budget_s": replays * TICK_S,
        }
    )
    try:
        brief = brief_of(trigger, recent, replicas, arms, (), settings)
    except BriefError:
        return None
    return replace(brief, asked_s=trigger.at_s)


@dataclass(slots=True)
class Evolution:
    """Cycles of synthesis, and what became of them."""

    situation: Situation
    effort: Effort
    archive: Path | None = None
    """Where what was bred is kept from one cycle to the next; None: nowhere."""
    gates: bool = True
    """Whether policies must hold on traffic that they were not bred on."""
    tunes: bool = True
    """Whether the numbers of what is promoted are tuned."""
    spent: Spent = field(default_factory=Spent)
    made: list["Made"] = field(default_factory=list["Made"])

    def __call__(self, request: Request) -> list[Newcomer]:
        """Run the cycle that the window loop asks for."""
        brief = brief_on(
            self.situation,
            request.recent,
            request.replicas,
            request.arms,
            self.effort.cycle_replays,
            request.trigger,
        )
        if brief is None:
            return []
        row = self.cycle(brief)
        newcomers = [Newcomer(arm, row.beaten or None, gain) for arm, gain in self._worthy(row)]
        at_s = request.trigger.at_s + self.effort.cycle_s
        self.made += [Made(n.arm, row.beaten, at_s, n.gain) for n in newcomers]
        return newcomers

    def cycle(self, brief: Brief) -> SynthesisRow:
        """Run one cycle; its time is counted in replays."""
        archive: Archive | None = None
        clock = counting_clock()
        with self.spent.thinking():
            if self.archive is not None:
                brief, _ = from_archive(brief, self.archive)
                archive = Archive.open(self.archive)
            row = step(
                brief,
                GeneticProposer(),
                clock,
                archive=archive,
                deadline=Deadline(clock),
                tunes=self.tunes,
            )
            if archive is not None and self.archive is not None:
                archive.save(self.archive)
        self.spent.replays += round(row.seconds / TICK_S)
        self.spent.cycles += 1
        self.spent.tokens += row.tokens
        self.spent.cost_usd += row.cost_usd
        return row

    def _worthy(self, row: SynthesisRow) -> list[tuple[Arm, float]]:
        if self.gates:
            return promoted_with_gain(row, TIME_STAMP)
        return promoted_with_gain(without_gates(row), TIME_STAMP)


@dataclass(frozen=True, slots=True)
class Made:
    """A policy that evolution made while it served."""

    arm: Arm
    beaten: str
    """Id of the arm it was better than."""
    at_s: float
    gain: float


def without_gates(row: SynthesisRow, most: int = 2) -> SynthesisRow:
    """Promote what came out of the race first, whatever the hold-out says."""

    def rank(candidate: CandidateRow) -> float:
        return candidate.gain if candidate.gain is not None else -np.inf

    raced = [c for c in row.candidates if c.gate not in {"verify", "novelty", "screen"}]
    best = [c for c in sorted(raced, key=rank, reverse=True) if rank(c) > 0.0][:most]
    chosen = {c.arm_id for c in best}
    return replace(
        row,
        promoted=tuple(c.arm_id for c in best),
        candidates=tuple(
            replace(c, verdict="promoted" if c.arm_id in chosen else "rejected")
            for c in row.candidates
        ),
    )


def tuned_arm(
    situation: Situation, arm: Arm, replicas: Sequence[ReplicaSpec], replays: int, spent: Spent
) -> str:
    """Tune an arm's numbers on the past within so many replays; return the source that is best there.

    The search starts anew while replays are left. Of what it finds and the arm itself, that is taken
    which does best on windows of the past that the search did not see.
    """
    brief = brief_on(situation, situation.past, replicas, [arm], replays)
    if brief is None:
        return arm.source
    policy = verify(arm.source)
    course = Course(brief.replicas, brief.objective, lambda: None)
    cells, unseen = race_cells(brief), holdout_cells(brief)
    rng = np.random.default_rng([situation.seed, 6])
    found = {policy.id: policy}
    left = replays
    with spent.thinking():
        while left > len(cells):
            tuned = tune(policy, course, cells, rng, left)
            found[tuned.policy.id] = tuned.policy
            if not tuned.replays:  # there is no number to turn
                break
            left -= tuned.replays
        best = max(found.values(), key=lambda p: course.mean(p.id, compile_policy(p), unseen))
    spent.replays += course.replays
    return best.source
