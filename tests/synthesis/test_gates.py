"""What the last gates forgive a specialist, on a course whose results are told instead of run."""

from dataclasses import replace

import pytest
from synthesis_scenes import incumbent, uneven_brief

from autopoiesis.arms.arm import Origin
from autopoiesis.arms.seeds import seed_arms
from autopoiesis.synthesis.gates import Candidate, Gates
from autopoiesis.synthesis.proposer import Proposal
from autopoiesis.synthesis.race import Course

SOURCES = {arm.name: arm.source for arm in seed_arms()}
BRIEF = replace(
    uneven_brief(),
    incumbents=tuple(incumbent(name, SOURCES[name]) for name in ("least-requests", "random")),
)


class Told(Course):
    """Incumbents earn 0.5 everywhere, everybody else more or less by what kind of cell it is."""

    def __init__(self, recent: float, held_out: float, to_come: float):
        super().__init__(BRIEF.replicas, BRIEF.objective, lambda: None)
        self.gains = recent, held_out, to_come
        self.better: dict[str, float] = {}
        """Policy → what it earns above that."""

    def utility(self, policy_id, program, cell):
        if policy_id in {i.arm_id for i in BRIEF.incumbents}:
            return 0.5
        recent, held_out, to_come = self.gains
        if any(cell.trace is window for window in BRIEF.windows):
            gain = recent
        elif any(cell.trace is window for window in BRIEF.holdout):
            gain = held_out
        else:
            gain = to_come
        return 0.5 + gain + self.better.get(policy_id, 0.0)

    def known(self, policy_id, cell):
        return self.utility(policy_id, None, cell)


def candidate(gates: Gates, name: str) -> Candidate:
    found = Candidate(Proposal(SOURCES[name], Origin.GENETIC))
    assert gates.verify(found)
    return found


@pytest.mark.parametrize(
    ("recent", "held_out", "passes", "said"),
    [
        (0.05, 0.05, True, "gain"),
        (0.0, -0.04, True, "gain"),  # loses where it is calm, a little
        (0.0, -0.06, False, "on hold-out windows"),
        (-0.03, -0.04, False, "on all windows as they were"),
        (-0.04, 0.0, False, "on all windows as they were"),
    ],
)
def test_a_specialist_for_what_may_come_may_lose_a_little_as_it_was(recent, held_out, passes, said):
    gates = Gates(BRIEF, Told(recent, held_out, to_come=0.3))
    found = candidate(gates, "least-tokens")
    assert gates.hold_out(found) is passes
    assert said in found.reason
    assert found.gate == ("promoted" if passes else "holdout")
    if passes:
        assert found.usual is not None
        assert found.usual.mean < found.gain.mean


def test_better_numbers_do_not_excuse_a_loss_as_it_was():
    course = Told(-0.04, -0.04, to_come=0.4)
    gates = Gates(BRIEF, course)
    before, tuned = (candidate(gates, name) for name in ("least-tokens", "deadline-slack"))
    course.better[tuned.id] = 0.01
    assert not gates.tuning_holds(tuned, before)
    assert "on all windows as they were" in tuned.reason
    assert before.reason == ""
    course.better[tuned.id] = 0.05
    assert gates.tuning_holds(tuned, before)
