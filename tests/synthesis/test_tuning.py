"""Tuning finds better numbers, changes nothing else, and knows when it has not found any."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthesis_scenes import ROUND_ROBIN, Scripted, incumbent, poisson, uneven_brief

from autopoiesis.arms.arm import Origin
from autopoiesis.arms.compiler import compile_policy, constants_of
from autopoiesis.arms.language import verify
from autopoiesis.arms.literals import literals_of, with_literals
from autopoiesis.synthesis.brief import Brief, cut
from autopoiesis.synthesis.proposer import Parent
from autopoiesis.synthesis.race import Course, OutOfTime, race_cells
from autopoiesis.synthesis.step import promoted_arms, step
from autopoiesis.synthesis.tuner import TuningProposer
from autopoiesis.synthesis.tuning import tune

DETUNED = """
def score(request, replica, fleet):
    return 1.0 * replica.in_flight + 0.05 * replica.in_flight / replica.speed + 0.0 * replica.running
"""
"""Knows that speed matters, but not by how much."""


def standing() -> float:
    """A clock that stands still: only the counts bound the work."""
    return 0.0


def course_of(brief, replays: int = 10**6) -> Course:
    left = iter(range(replays))

    def in_time() -> None:
        if next(left, None) is None:
            raise OutOfTime

    return Course(brief.replicas, brief.objective, in_time)


def tuned(source: str, most_replays: int = 200, replays: int = 10**6, seed: int = 0):
    brief = uneven_brief()
    course = course_of(brief, replays)
    result = tune(
        verify(source), course, race_cells(brief), np.random.default_rng(seed), most_replays
    )
    return result, course


def test_a_badly_weighted_policy_gets_better_numbers_and_the_same_structure():
    result, course = tuned(DETUNED, 400)
    assert result.gain > 0.01
    before, after = literals_of(verify(DETUNED)), literals_of(result.policy)
    assert after != before
    assert after[-1] == 0.0
    assert all(new > 0.0 for new in after[:-1])
    assert with_literals(result.policy, before).id == verify(DETUNED).id
    cells = race_cells(uneven_brief())
    fresh = course_of(uneven_brief())
    gain = fresh.mean(result.policy.id, compile_policy(result.policy), cells) - fresh.mean(
        "before", compile_policy(verify(DETUNED)), cells
    )
    assert gain == pytest.approx(result.gain)
    assert course.replays == result.replays <= 400


def test_the_same_seed_finds_the_same_numbers():
    assert tuned(DETUNED)[0] == tuned(DETUNED)[0]


def test_a_policy_without_numbers_is_left_alone():
    policy = verify(ROUND_ROBIN)
    assert literals_of(policy) == ()
    result, course = tuned(ROUND_ROBIN)
    assert (result.policy, result.gain, course.replays) == (policy, 0.0, 0)


@given(replays=st.integers(0, 120), most_replays=st.integers(1, 120))
@settings(max_examples=12, deadline=None)
def test_it_stops_wherever_time_or_replays_end_with_a_policy_no_worse(replays, most_replays):
    result, course = tuned(DETUNED, most_replays, replays)
    assert result.gain >= 0.0
    assert (result.policy.id == verify(DETUNED).id) == (result.gain == 0.0)
    assert course.replays <= replays
    cells = len(race_cells(uneven_brief()))
    assert course.replays <= max(most_replays, cells)
    constants = constants_of(compile_policy(result.policy)).tolist()
    assert constants == list(literals_of(result.policy))


def bearable_brief() -> Brief:
    """The uneven fleet under half of that load: in a total overload hardly any number matters."""
    windows, holdout = cut(poisson(30.0, 60.0, 7), window_s=6.0, warmup_s=1.0)
    return replace(uneven_brief(), windows=windows, holdout=holdout)


def test_a_promoted_policy_whose_numbers_are_bad_is_replaced_by_itself_with_better_ones():
    brief = replace(bearable_brief(), max_candidates=1)
    row = step(brief, Scripted([DETUNED]), clock=standing)
    winner = row.candidates[0]
    assert (winner.verdict, winner.gate, row.promoted) == ("promoted", "tuned", (winner.arm_id,))
    assert winner.parents == (verify(DETUNED).id,)
    assert "against its untuned self on hold-out windows" in winner.reason
    (before,) = (c for c in row.candidates if c.arm_id == verify(DETUNED).id)
    assert (before.verdict, before.gate) == ("rejected", "tuning")
    assert winner.arm_id in before.reason
    assert winner.gain > before.gain
    (arm,) = promoted_arms(row, 1.0)
    assert (arm.origin, arm.parents) == (Origin.TUNED, (verify(DETUNED).id,))
    assert winner.gain == pytest.approx(
        step(brief, Scripted([DETUNED]), clock=standing).candidates[0].gain
    )


def test_the_tuning_proposer_tunes_an_arm_on_request_and_passes_the_gates():
    brief = bearable_brief()
    arm = incumbent("detuned", DETUNED)
    brief = replace(brief, incumbents=(*brief.incumbents, arm), max_candidates=2)
    row = step(brief, TuningProposer(standing), clock=standing)
    assert row.synthesizer == "tuned"
    assert row.beaten == arm.arm_id
    winner = row.candidates[0]
    assert (winner.verdict, winner.parents) == ("promoted", (arm.arm_id,))
    assert [a.origin for a in promoted_arms(row, 1.0)] == [Origin.TUNED] * len(row.promoted)


def test_the_tuning_proposer_stops_in_time_and_does_not_tune_what_it_has_tuned():
    brief = uneven_brief()
    parents = [Parent(i.arm_id, i.source, i.name, 0.0) for i in brief.incumbents]
    ticks = iter(range(10**6))
    late = TuningProposer(lambda: float(next(ticks)) * 1000.0)
    assert late.propose(brief, parents, 5, np.random.default_rng(0)) == []
    assert TuningProposer().propose(brief, parents[:1], 5, np.random.default_rng(0)) == []
