"""The gates a proposal passes in order: verify, novelty, screen, race, hold-out, tuning."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from autopoiesis.arms.arm import Origin, arm_id
from autopoiesis.arms.compiler import compile_policy
from autopoiesis.arms.language import Policy, PolicyError, verify
from autopoiesis.arms.machine import Program
from autopoiesis.arms.parts import parts_of
from autopoiesis.arms.slow import SlowPolicy, verify_slow
from autopoiesis.synthesis.archive import Elite
from autopoiesis.synthesis.brief import Brief, Incumbent
from autopoiesis.synthesis.complement import by_complement
from autopoiesis.synthesis.probe import REQUESTS, STATES, Probe
from autopoiesis.synthesis.proposer import Proposal, joined
from autopoiesis.synthesis.race import (
    CONFIDENCE,
    Cell,
    Course,
    Gain,
    Pair,
    Runs,
    future_cells,
    holdout_cells,
    paired_gain,
    race_cells,
    screen_cell,
    window_cells,
)
from autopoiesis.synthesis.tuning import tune
from autopoiesis.telemetry.records import CandidateRow

Gate = Literal["verify", "novelty", "screen", "race", "holdout", "promoted", "tuning", "tuned"]
PROMOTING = frozenset({"promoted", "tuned"})
"""Gates at which a candidate stands that is promoted: as it was proposed, or with other numbers."""

CLEARLY_WORSE = 0.02
"""Loss in mean utility on the screen that ends a candidate."""
FUTILE_CONFIDENCE = 0.8
"""A race stops once an interval of this coverage lies below zero: stopping early promotes nothing."""
PROBED = STATES * REQUESTS
KEPT = 4
"""Fewest candidates of a generation that go on from one round of the race to the next."""
SPECIALIST_LOSS = 0.05
"""What a candidate may lose on hold-out windows as they were, if it gains more in what may come: the bandit
gives usual windows to others."""

USUAL_LOSS = 0.02
"""What it may lose on all windows as they were, those it was bred on among them."""


@dataclass(slots=True, eq=False)
class Candidate:
    """A proposal on its way through the gates."""

    proposal: Proposal
    policy: Policy | None = None
    program: Program | None = None
    slow: SlowPolicy | None = None
    gate: Gate = "verify"
    """The gate that decided, or that it stands before."""
    reason: str = ""
    """Why it was rejected; empty while it is in."""
    gain: Gain | None = None
    """Over the best incumbent, surges and varied futures among the windows."""
    usual: Gain | None = None
    """The same on windows as they were, of one that came so far: what to expect of it now."""
    decided: bool = True
    """False if time ran out before its gate could decide."""

    @property
    def id(self) -> str:
        """Id of the arm that it would be; empty before it has passed `verify`."""
        if self.policy is None:
            return ""
        return arm_id(self.policy.id, self.slow.id if self.slow else "")

    @property
    def runnable(self) -> tuple[str, Runs]:
        """Id and what can be replayed, once it has passed `verify`."""
        assert self.program is not None
        return self.id, Pair(self.program, self.slow) if self.slow else self.program

    def reject(self, gate: Gate, reason: str) -> None:
        """Note the gate that decided against it and why."""
        self.gate, self.reason = gate, reason

    def row(self) -> CandidateRow:
        """Return what is kept of it."""
        raw, gain = self.proposal.source, self.usual or self.gain
        text = raw if isinstance(raw, str) else raw.decode("utf-8", "replace")
        return CandidateRow(
            arm_id=self.id,
            source=self.policy.source if self.policy else text[:8192],
            verdict="promoted" if self.gate in PROMOTING else "rejected",
            gate=self.gate,
            reason=self.reason,
            gain=gain.mean if gain else None,
            gain_low=_finite(gain.low) if gain else None,
            gain_high=_finite(gain.high) if gain else None,
            parents=self.proposal.parents,
            thought=self.proposal.thought,
            slow=self.slow.source if self.slow else "",
            model=self.proposal.model,
            tokens=self.proposal.tokens,
            cost_usd=self.proposal.cost_usd,
            prompt=self.proposal.prompt if self.gate in PROMOTING else "",
            answer=self.proposal.answer if self.gate in PROMOTING else "",
        )


def _finite(bound: float) -> float | None:
    return bound if abs(bound) < 1e300 else None


@dataclass(slots=True)
class Rival:
    """An incumbent, ready to run."""

    name: str
    policy: Policy
    program: Program
    slow: SlowPolicy | None = None
    gain: float = 0.0
    """Against the best incumbent, on the recent windows that both ran."""

    @property
    def id(self) -> str:
        """Id of its arm."""
        return arm_id(self.policy.id, self.slow.id if self.slow else "")

    @property
    def runnable(self) -> tuple[str, Runs]:
        """Id and what can be replayed."""
        return self.id, Pair(self.program, self.slow) if self.slow else self.program


class Gates:
    """Judges candidates against the best incumbent, on the same traffic and seeds."""

    def __init__(self, brief: Brief, course: Course) -> None:
        """Find the incumbent to beat, by a race on the recent and the hold-out windows.

        Only incumbents run there, so nothing of the hold-out is given away to candidates.
        Raises PolicyError if an incumbent's source is no policy.
        """
        self._brief = brief
        self._course = course
        self._probe = Probe(brief.replicas, brief.objective, brief.seed)
        self._known = set(brief.known)
        self._decisions: dict[tuple[bytes, str], str] = {}
        self.screen_on = screen_cell(brief)
        self._as_it_was = window_cells(brief)
        self.race_on = race_cells(brief, self._as_it_was)
        self._holdout_on = holdout_cells(brief)
        self._futures_on = future_cells(brief)
        self.rivals = [_ready(incumbent) for incumbent in brief.incumbents]
        for rival in self.rivals:
            self._known.add(rival.id)
            decisions = self._probe.decisions(rival.program), rival.slow.id if rival.slow else ""
            self._decisions.setdefault(decisions, rival.name)
        self.best, self.best_utility = self._best_of(self.rivals)

    def _best_of(self, rivals: Sequence[Rival]) -> tuple[Rival, float]:
        """Race incumbents window by window, dropping clear losers; return the best and its utility."""
        cells = [*self._as_it_was, *self._holdout_on]
        cells += [cell for cell in self.race_on if cell not in self._as_it_was]
        running = list(rivals)
        for done in range(1, len(cells) + 1):
            means = [self._course.mean(*r.runnable, cells[:done]) for r in running]
            self.best = running[means.index(max(means))]
            running = [r for r in running if self.gain(*r.runnable, cells[:done]).high >= 0.0]
        for rival in rivals:
            raced = [c for c in self.race_on if self._course.known(rival.id, c) is not None]
            rival.gain = self.gain(*rival.runnable, raced).mean
        return self.best, self._course.mean(*self.best.runnable, cells)

    def by_window(self, policy_id: str) -> tuple[float | None, ...]:
        """Return the policy's utility on each recent window as it was, oldest first."""
        return tuple(self._course.known(policy_id, cell) for cell in reversed(self._as_it_was))

    @property
    def holdout_replays(self) -> int:
        """Replays that one finalist costs in the hold-out."""
        return len(self._holdout_on) + len(self._futures_on)

    def gain(
        self,
        policy_id: str,
        program: Runs,
        cells: Sequence[Cell],
        confidence: float = CONFIDENCE,
    ) -> Gain:
        """Return the policy's paired gain over the best incumbent."""
        best = self.best
        differences = [
            self._course.utility(policy_id, program, cell)
            - self._course.utility(*best.runnable, cell)
            for cell in cells
        ]
        return paired_gain(differences, [cell.window for cell in cells], confidence)

    def verify(self, candidate: Candidate) -> bool:
        """Is it a policy, and does it decide on plans if and only if they are judged?"""
        try:
            fast, slow = parts_of(candidate.proposal.source)
            policy = verify(fast)
            planned = verify_slow(slow) if slow else None
        except PolicyError as error:
            candidate.reject("verify", str(error))
            return False
        if bool(planned) is not bool(self._brief.yards):
            here = "are missing" if self._brief.yards else "have no place where the fleet is fixed"
            candidate.reject("verify", f"its slow functions {here}")
            return False
        candidate.policy, candidate.slow = policy, planned
        candidate.program = compile_policy(policy)
        if nonsense := self._probe.nonsense(candidate.program):
            candidate.reject(
                "verify",
                f"all its scores are infinite in {nonsense} of {PROBED} probed states, and it would be taken off",
            )
            return False
        return True

    def novelty(self, candidate: Candidate) -> bool:
        """Is it new, in text and in what it decides?"""
        candidate.gate = "novelty"
        policy_id, program = candidate.id, candidate.program
        assert program is not None
        if policy_id in self._known:
            candidate.reject("novelty", "the same policy is known already")
            return False
        self._known.add(policy_id)
        decisions = self._probe.decisions(program), candidate.slow.id if candidate.slow else ""
        twin = self._decisions.setdefault(decisions, policy_id)
        if twin != policy_id:
            candidate.reject("novelty", f"decides as {twin} does in every probed state")
            return False
        return True

    def screen(self, candidate: Candidate) -> bool:
        """Does it hold up in a short replay of the newest window?"""
        candidate.gate = "screen"
        candidate.gain = self.gain(*candidate.runnable, [self.screen_on])
        if candidate.gain.mean < -CLEARLY_WORSE:
            candidate.reject(
                "screen",
                f"utility {candidate.gain.mean:+.4f} against {self.best.name} in a short replay",
            )
            return False
        return True

    def race(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Race a generation window by window; losers and the slower half drop out as it goes.

        Returns those that finished, best first.
        """
        for candidate in candidates:
            candidate.gate = "race"
        running = sorted(candidates, key=_mean_gain, reverse=True)
        for done in range(1, len(self.race_on) + 1):
            for candidate in running:
                candidate.gain = self.gain(
                    *candidate.runnable, self.race_on[:done], FUTILE_CONFIDENCE
                )
            for candidate in running:
                if candidate.gain and candidate.gain.high < 0.0:
                    candidate.reject("race", f"behind {self.best.name} after {done} replays")
            running = sorted((c for c in running if not c.reason), key=_mean_gain, reverse=True)
            keep = max(KEPT, (len(running) + 1) // 2)
            for candidate in running[keep:]:
                candidate.reject(
                    "race", f"{keep} of its generation were ahead of it after {done} replays"
                )
            running = running[:keep]
        for candidate in running:
            candidate.gain = self.gain(*candidate.runnable, self.race_on)
        return running

    def elite(self, candidate: Candidate) -> Elite:
        """Return what the archive keeps of a candidate that has finished the race."""
        policy_id, program = candidate.runnable
        assert candidate.policy is not None
        slow = candidate.slow.source if candidate.slow else ""
        source = joined(candidate.policy.source, slow)
        cells = self._as_it_was[::-1]
        gains = tuple(self.gain(policy_id, program, [cell]).mean for cell in cells)
        behaviour = self._course.behaviour(policy_id, cells)
        return Elite(policy_id, source, gains, behaviour, self._brief.asked_s)

    def complementary(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Order candidates by what each adds, replay by replay, to the best incumbent and those before."""
        if not candidates:
            return []
        table = np.array(
            [[self.gain(*c.runnable, [cell]).mean for cell in self.race_on] for c in candidates]
        )
        return [candidates[i] for i in by_complement(table, np.zeros(table.shape[1]))]

    def distinct(self, finishers: Sequence[Candidate]) -> list[Candidate]:
        """Keep the shortest of those that did exactly the same in every replay of the race."""
        shortest: dict[tuple[float, ...], Candidate] = {}
        for candidate in finishers:
            did = tuple(self._course.utility(*candidate.runnable, cell) for cell in self.race_on)
            rival = shortest.setdefault(did, candidate)
            if rival is candidate:
                continue
            kept, dropped = sorted((rival, candidate), key=_length)
            shortest[did] = kept
            dropped.reject(
                "novelty", f"did exactly as the shorter {kept.runnable[0]} in every replay"
            )
        return list(shortest.values())

    def hold_out(self, candidate: Candidate) -> bool:
        """Does the gain hold on windows and futures that nothing was fitted to?"""
        candidate.gate = "holdout"
        best, floor = self.best.name, self._brief.min_gain
        unseen = self.gain(*candidate.runnable, self._holdout_on)
        if unseen.mean < -SPECIALIST_LOSS:
            candidate.reject(
                "holdout", f"utility {unseen.mean:+.4f} against {best} on hold-out windows"
            )
            return False
        futures = self.gain(*candidate.runnable, self._futures_on)
        if futures.mean < 0.0:
            candidate.reject(
                "holdout", f"utility {futures.mean:+.4f} against {best} in perturbed futures"
            )
            return False
        pooled = candidate.gain = self.gain(*candidate.runnable, self._everything)
        if not (pooled.low > 0.0 and pooled.mean >= floor):
            candidate.reject(
                "holdout", f"gain {pooled} over {best} is not surely above 0 and at least {floor:g}"
            )
            return False
        if not self._stands_as_it_was(candidate, "holdout"):
            return False
        candidate.gate = "promoted"
        candidate.reason = (
            f"gain {pooled} over {best}; "
            f"hold-out windows {unseen.mean:+.4f}, perturbed futures {futures.mean:+.4f}"
        )
        return True

    def _stands_as_it_was(self, candidate: Candidate, gate: Gate) -> bool:
        """Note what it gains on all windows as they were; reject what loses more than `USUAL_LOSS` there."""
        usual = self.gain(*candidate.runnable, [*self._as_it_was, *self._holdout_on])
        candidate.usual = usual
        if usual.mean < -USUAL_LOSS:
            told = f"utility {usual.mean:+.4f} against {self.best.name} on all windows as they were"
            candidate.reject(gate, told)
            return False
        return True

    @property
    def _everything(self) -> list[Cell]:
        return [*self.race_on, *self._holdout_on, *self._futures_on]

    def retuned(self, candidate: Candidate, rng: np.random.Generator) -> Candidate | None:
        """Search better numbers for a promoted candidate on the recent windows; None if there are none."""
        assert candidate.policy is not None
        slow = candidate.slow
        found = tune(candidate.policy, self._course, self.race_on, rng, slow=slow)
        tuned = arm_id(found.policy.id, slow.id if slow else "")
        if tuned in self._known:
            return None
        self._known.add(tuned)
        thought = f"the numbers of {candidate.id} tuned in {found.replays} replays"
        proposal = replace(
            candidate.proposal,
            source=joined(found.policy.source, slow.source if slow else ""),
            origin=Origin.TUNED,
            parents=(candidate.id,),
            thought=thought,
            tokens=0,
            cost_usd=0.0,
        )
        return Candidate(proposal, found.policy, compile_policy(found.policy), slow, "tuning")

    def tuning_holds(self, tuned: Candidate, before: Candidate) -> bool:
        """Do the new numbers surely beat the old ones on windows that they were not fitted to?"""
        first = len(self._brief.windows)
        unfitted = [c for c in (*self._holdout_on, *self._futures_on) if c.window >= first]
        differences = [
            self._course.utility(*tuned.runnable, cell)
            - self._course.utility(*before.runnable, cell)
            for cell in unfitted
        ]
        gain = paired_gain(differences, [cell.window for cell in unfitted])
        pooled = tuned.gain = self.gain(*tuned.runnable, self._everything)
        told = f"utility {gain} against its untuned self on hold-out windows and their futures"
        if not (gain.low > 0.0 and pooled.low > 0.0):
            tuned.reject("tuning", f"{told}: not surely better")
            return False
        if not self._stands_as_it_was(tuned, "tuning"):
            return False
        tuned.gate = "tuned"
        tuned.reason = f"gain {pooled} over {self.best.name}; {told}"
        before.reject("tuning", f"good enough, but better with other numbers: {tuned.runnable[0]}")
        return True


def _length(candidate: Candidate) -> int:
    return len(candidate.policy.source) if candidate.policy else 0


def _mean_gain(candidate: Candidate) -> float:
    return candidate.gain.mean if candidate.gain else 0.0


def _ready(incumbent: Incumbent) -> Rival:
    policy = verify(incumbent.source)
    slow = verify_slow(incumbent.slow) if incumbent.slow else None
    return Rival(incumbent.name, policy, compile_policy(policy), slow)
