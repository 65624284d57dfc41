"""One synthesis cycle: propose, judge, breed from what did well, promote at most two, tune those."""

import time
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from autopoiesis.arms.arm import Arm, Origin, State
from autopoiesis.synthesis.archive import Archive, Elite
from autopoiesis.synthesis.behaviour import Cell
from autopoiesis.synthesis.brief import Brief, BriefError, Lesson
from autopoiesis.synthesis.diagnosis import diagnosis
from autopoiesis.synthesis.gates import PROMOTING, Candidate, Gates
from autopoiesis.synthesis.proposer import Parent, Proposal, Proposer
from autopoiesis.synthesis.race import Clock, Course, Deadline, OutOfTime
from autopoiesis.telemetry.records import SynthesisRow

GENERATION = 24
"""Proposals asked for at a time."""
FINALISTS = 4
"""Most candidates that see the hold-out: each look at it costs some of its honesty."""
PROMOTED = 2
"""Most candidates promoted by one cycle."""
BREEDERS = 10
"""Raced candidates that may become parents, besides the incumbents."""
HOLDOUT_SHARE = 0.4
"""Largest share of the budget kept back for the hold-out."""
TUNING_SHARE = 0.2
"""Share of the budget kept back for tuning what passes."""
SEARCHING = 0.7
"""Share of the time for tuning that goes into the search; the rest is for judging what it found."""
LESSONS = 12
"""Lessons of this cycle that its proposer is told, besides those of earlier ones."""
READERS = frozenset({Origin.FILES, Origin.OPENAI, Origin.FLEET})
"""Proposers that read: for them the twin is asked where time goes."""


def step(
    brief: Brief,
    proposer: Proposer,
    clock: Clock = time.monotonic,
    cpu_clock: Clock = time.process_time,
    archive: Archive | None = None,
    deadline: Deadline | None = None,
    *,
    tunes: bool = True,
) -> SynthesisRow:
    """Run one cycle within the brief's budget; return every verdict, promoted policies best first.

    What finished the race goes into the `archive`. With the stops of an earlier run in `deadline`,
    time ends where it ended then. Without `tunes`, what is promoted keeps its numbers.

    Raises BriefError where the brief has no hold-out, PolicyError where an incumbent is no policy.
    """
    if not brief.holdout:
        raise BriefError(
            "A brief needs at least 1 hold-out window; wait for more traffic or cut it shorter."
        )
    cycle = _Cycle(brief, proposer, clock, deadline or Deadline(clock), tunes=tunes)
    started_cpu_s = cpu_clock()
    try:
        cycle.run()
    finally:
        cycle.close()
    if archive is not None:
        archive.enter(brief, cycle.bred, cycle.failed)
    row = SynthesisRow(
        started_s=brief.asked_s,
        window=brief.window,
        since_window=brief.since_window,
        trigger=brief.trigger,
        synthesizer=proposer.origin.value,
        seconds=clock() - cycle.started_s,
        cpu_seconds=cpu_clock() - started_cpu_s,
        tokens=proposer.account.tokens,
        cost_usd=proposer.account.cost_usd,
        promoted=tuple(c.runnable[0] for c in cycle.promoted),
        beaten=cycle.beaten,
        candidates=tuple(
            c.row()
            for c in (*cycle.promoted, *(c for c in cycle.candidates if c.gate not in PROMOTING))
        ),
        error=cycle.error,
        conclusion=cycle.conclusion,
    )
    proposer.learn([(c.proposal, c.row()) for c in cycle.candidates if c.decided])
    return row


def promoted_arms(row: SynthesisRow, created_at: float) -> list[Arm]:
    """Return the promoted policies of a cycle as arms, best first; they still have to earn traffic."""
    by_id = {c.arm_id: c for c in row.candidates if c.verdict == "promoted"}
    return [
        Arm(
            id=arm_id,
            name=f"{row.synthesizer}-{arm_id[:4]}",
            origin=Origin.TUNED if by_id[arm_id].gate == "tuned" else Origin(row.synthesizer),
            state=State.CANDIDATE,
            source=by_id[arm_id].source,
            slow=by_id[arm_id].slow,
            created_at=created_at,
            parents=by_id[arm_id].parents,
            reason=by_id[arm_id].reason,
            thought=by_id[arm_id].thought,
            prompt=by_id[arm_id].prompt,
            answer=by_id[arm_id].answer,
        )
        for arm_id in row.promoted
    ]


class _Cycle:
    """The state of one cycle."""

    def __init__(
        self, brief: Brief, proposer: Proposer, clock: Clock, deadline: Deadline, *, tunes: bool
    ) -> None:
        self.candidates: list[Candidate] = []
        self.promoted: list[Candidate] = []
        self.error = ""
        self.beaten = ""
        self.conclusion = ""
        self.bred: list[Elite] = []
        self.failed: set[str] = set()
        self.started_s = clock()
        self._brief = brief
        self._proposer = proposer
        self._clock = clock
        self._tunes = tunes
        self._deadline = deadline
        self._deadline.until_s = self.started_s + brief.budget_s
        self._course = Course(
            brief.replicas,
            brief.objective,
            deadline.look,
            brief.yards,
            allow_unsandboxed=brief.allow_unsandboxed,
        )
        self._diagnosed: dict[str, str] = {}
        self._raced: list[Candidate] = []

    def close(self) -> None:
        """End what the cycle has started."""
        self._course.close()

    def run(self) -> None:
        """Run the cycle to its conclusion, or to the error that kept it from one."""
        try:
            gates = Gates(self._brief, self._course)
        except OutOfTime:
            self.error = (
                f"The budget of {self._brief.budget_s:g} s was spent on the incumbents before any candidate; "
                "give more time or fewer and shorter windows."
            )
            return
        self.beaten = gates.best.id
        best = f"the best incumbent, {gates.best.name}, with utility {gates.best_utility:.4f}"
        if 1.0 - gates.best_utility < self._brief.min_gain:
            self.conclusion = (
                f"Nothing promoted: {best}, leaves no room for {self._brief.min_gain:g} more."
            )
            return
        end_s = self._deadline.until_s
        self._deadline.until_s = end_s - self._kept_back_s(gates)
        try:
            self._search(gates)
        except OutOfTime:
            if not self.candidates:
                self.conclusion = (
                    f"Nothing promoted: {best}, and the others took the time of the search; "
                    f"give more than {self._brief.budget_s:g} s, or fewer and shorter windows."
                )
                return
        self._deadline.until_s = end_s
        self._judge_finalists(gates)
        if self._tunes:
            self._tune_promoted(gates)
        self._explain_the_rest()
        self.bred = [gates.elite(c) for c in self._raced]
        self.failed = {c.id for c in self.candidates if c.policy and c.gate == "screen"}
        if self.promoted:
            gains = ", ".join(f"{c.runnable[0]} {c.gain}" for c in self.promoted)
            self.conclusion = f"Promoted with a gain over {best}: {gains}."
        else:
            self.conclusion = (
                f"Nothing promoted: none of {len(self.candidates)} candidates surely beats {best}."
            )
        if remarks := self._proposer.account.remarks:
            self.conclusion += f" {self._proposer.origin} says: {' '.join(remarks)}"

    def _kept_back_s(self, gates: Gates) -> float:
        """Return the time that the hold-out will need, from what replays have cost so far."""
        replay_s = (self._clock() - self.started_s) / max(self._course.replays, 1)
        needed_s = 1.5 * replay_s * gates.holdout_replays * (FINALISTS + 1)
        holdout_s = min(needed_s, HOLDOUT_SHARE * self._brief.budget_s)
        return holdout_s + TUNING_SHARE * self._brief.budget_s * self._tunes

    def _search(self, gates: Gates) -> None:
        """Breed generation after generation until time, room or ideas run out."""
        rng = np.random.default_rng([self._brief.seed, 4])
        self._start_from_the_archive(gates)
        while len(self.candidates) < self._brief.max_candidates:
            self._deadline.look()
            n = min(GENERATION, self._brief.max_candidates - len(self.candidates))
            parents = self._parents(gates)
            proposals = self._proposer.propose(self._blind(parents), parents, n, rng)[:n]
            if not proposals:
                return
            self._try(gates, proposals)

    def _start_from_the_archive(self, gates: Gates) -> None:
        """Race first what was bred under such traffic before, or is known to the caller."""
        starters = self._brief.archived[: min(GENERATION, self._brief.max_candidates)]
        thought = "known before this cycle: from the archive of this regime, or written by people"
        self._try(gates, [Proposal(s, self._proposer.origin, thought=thought) for s in starters])

    def _try(self, gates: Gates, proposals: Sequence[Proposal]) -> None:
        """Let a generation pass the gates up to the race."""
        generation = [Candidate(proposal) for proposal in proposals]
        self.candidates += generation
        new = [c for c in generation if gates.verify(c) and gates.novelty(c)]
        self._raced += gates.race([c for c in new if gates.screen(c)])

    def _blind(self, parents: Sequence[Parent]) -> Brief:
        """Return the brief as proposers may see it, with what the cycle has found out so far."""
        known: dict[str, object] = {"left_s": self._deadline.left_s}
        if self._proposer.origin in READERS:
            refused = [c for c in self.candidates if c.reason][-LESSONS:]
            lessons = [Lesson(c.gate, c.reason, c.proposal.thought) for c in reversed(refused)]
            known["lessons"] = (*lessons, *self._brief.lessons)
            known["diagnosis"] = self._diagnose(parents[0])
        return self._brief.for_proposers(**known)

    def _diagnose(self, parent: Parent) -> str:
        if self._brief.yards:  # it tells of a fleet that stays as it is
            return ""
        if parent.id not in self._diagnosed:
            self._diagnosed[parent.id] = diagnosis(self._brief, parent)
        return self._diagnosed[parent.id]

    def _parents(self, gates: Gates) -> list[Parent]:
        """Return whom to start from, best first: incumbents and the best that finished a race."""
        pool = [
            Parent(
                r.id,
                r.policy.source,
                r.name,
                r.gain,
                gates.by_window(r.id),
                r.slow.source if r.slow else "",
            )
            for r in gates.rivals
        ]
        for candidate in self._breeders(gates):
            assert candidate.policy is not None
            id_, gain = candidate.id, candidate.gain.mean if candidate.gain else None
            slow = candidate.slow.source if candidate.slow else ""
            pool.append(Parent(id_, candidate.policy.source, id_, gain, gates.by_window(id_), slow))
        return sorted(pool, key=lambda parent: parent.gain or 0.0, reverse=True)

    def _breeders(self, gates: Gates) -> list[Candidate]:
        """Return the best of each cell of behaviour, and after them the others, best first."""
        first: list[Candidate] = []
        others: list[Candidate] = []
        taken: set[Cell] = set()
        for candidate in self._leaders()[: 4 * BREEDERS]:
            cell = gates.elite(candidate).cell
            (others if cell in taken else first).append(candidate)
            taken.add(cell)
        return (first + others)[:BREEDERS]

    def _leaders(self) -> list[Candidate]:
        return sorted(self._raced, key=lambda c: c.gain.mean if c.gain else 0.0, reverse=True)

    def _judge_finalists(self, gates: Gates) -> None:
        worthy = [c for c in self._leaders() if c.gain and c.gain.mean >= self._brief.min_gain]
        for finalist in gates.complementary(gates.distinct(worthy))[:FINALISTS]:
            try:
                if gates.hold_out(finalist):
                    self.promoted.append(finalist)
            except OutOfTime:
                break
        self.promoted = gates.complementary(self.promoted)
        for spare in self.promoted[PROMOTED:]:
            spare.reject("holdout", f"good enough, but others add more: {spare.reason}")
        del self.promoted[PROMOTED:]

    def _tune_promoted(self, gates: Gates) -> None:
        """Replace promoted policies by themselves with better numbers where those surely are better."""
        rng = np.random.default_rng([self._brief.seed, 5])
        end_s = self._deadline.until_s
        for i, candidate in enumerate(self.promoted):
            left_s = (end_s - self._clock()) / (len(self.promoted) - i)
            self._deadline.until_s = self._clock() + SEARCHING * left_s
            tuned = gates.retuned(candidate, rng)
            self._deadline.until_s = end_s
            if tuned is None:
                continue
            self.candidates.append(tuned)
            with suppress(OutOfTime):
                if gates.tuning_holds(tuned, candidate):
                    self.promoted[i] = tuned

    def _explain_the_rest(self) -> None:
        """Give a reason to those that no gate has decided on."""
        floor = self._brief.min_gain
        for c in self.candidates:
            if c.reason:
                continue
            if c.gate != "race" or c not in self._raced:
                c.reject(c.gate, "the budget ran out before this gate decided")
                c.decided = False
            elif c.gain is not None and c.gain.mean >= floor:
                c.reject(
                    "race",
                    f"gain {c.gain}, but others did better and only {FINALISTS} see the hold-out",
                )
            else:
                c.reject("race", f"gain {c.gain} is below {floor:g}")
