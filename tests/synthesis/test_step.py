"""The cycle finds what is there to be found, refuses where there is nothing, and ends in time."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from synthesis_scenes import (
    BY_SPEED,
    ROUND_ROBIN,
    Scripted,
    hopeless_brief,
    idle_brief,
    poisson,
    uneven_brief,
)

from autopoiesis.arms.arm import Origin, State
from autopoiesis.arms.compiler import compile_policy
from autopoiesis.arms.language import PolicyError, verify
from autopoiesis.synthesis.brief import BriefError, Incumbent
from autopoiesis.synthesis.files import FilesProposer
from autopoiesis.synthesis.genetic import GeneticProposer
from autopoiesis.synthesis.race import mean_utility
from autopoiesis.synthesis.step import PROMOTED, promoted_arms, step
from autopoiesis.twin.simulation import run_arm


def fresh_utility(source: str, brief) -> float:
    """Utility on traffic that no part of the cycle has seen."""
    program = compile_policy(verify(source))
    trace = poisson(60.0, 20.0, 991)
    outcome = run_arm(trace, brief.replicas, program, brief.objective, 5)
    return mean_utility(outcome, brief.objective, np.ones(len(trace), bool))


def test_the_genetic_proposer_beats_speed_blind_arms():
    brief = uneven_brief()
    row = step(brief, GeneticProposer())
    assert row.error == ""
    assert 1 <= len(row.promoted) <= PROMOTED
    assert row.conclusion.startswith("Promoted with a gain")
    winner = row.candidates[0]
    assert (winner.arm_id, winner.verdict) == (row.promoted[0], "promoted")
    assert winner.gate in {"promoted", "tuned"}
    assert winner.gain_low > 0.0
    before = max(fresh_utility(i.source, brief) for i in brief.incumbents)
    assert fresh_utility(winner.source, brief) > before + 0.05
    proposed = [
        c
        for c in row.candidates
        if c.gate not in {"tuning", "tuned"} or not c.thought.startswith("the numbers of")
    ]
    assert len(proposed) == brief.max_candidates
    assert all(c.reason and c.verdict in {"promoted", "rejected"} for c in row.candidates)
    assert Counter(c.gate for c in row.candidates)["race"] > 0
    assert row.cpu_seconds > 0.0
    (arm, *_) = promoted_arms(row, created_at=9.0)
    origin = Origin.TUNED if winner.gate == "tuned" else Origin.GENETIC
    assert (arm.id, arm.origin, arm.state) == (row.promoted[0], origin, State.CANDIDATE)
    assert arm.parents
    assert verify(arm.source).id == arm.id


def test_same_brief_same_verdicts():
    brief = replace(uneven_brief(), max_candidates=24)
    first, second = (step(brief, GeneticProposer()) for _ in range(2))
    assert first.candidates == second.candidates
    assert first.promoted == second.promoted


def test_without_headroom_nothing_is_even_tried():
    row = step(idle_brief(), GeneticProposer())
    assert (row.promoted, row.candidates, row.error) == ((), (), "")
    assert "leaves no room" in row.conclusion


def test_where_no_policy_can_do_better_none_is_promoted():
    row = step(hopeless_brief(), GeneticProposer())
    assert row.promoted == ()
    assert len(row.candidates) == 24
    assert "none of 24 candidates surely beats" in row.conclusion


def test_a_gain_below_the_brief_minimum_is_refused():
    row = step(replace(uneven_brief(), min_gain=0.6), Scripted([BY_SPEED]))
    assert row.promoted == ()
    assert "leaves no room" in row.conclusion or row.candidates[0].gate == "race"


def test_each_gate_says_why():
    worse = "def score(request, replica, fleet):\n    return replica.speed\n"
    proposer = Scripted(
        ["def score(request):\n    return 1", ROUND_ROBIN, "import os", worse], [BY_SPEED, BY_SPEED]
    )
    row = step(uneven_brief(), proposer)
    gates = {c.source: (c.gate, c.reason) for c in row.candidates}
    assert gates["import os"][0] == "verify"
    assert "line 1" in gates["import os"][1]
    assert gates[verify(worse).source][0] == "screen"
    assert Counter(c.gate for c in row.candidates) == {
        "verify": 2,
        "novelty": 2,
        "screen": 1,
        "promoted": 1,
    }
    assert row.promoted == (verify(BY_SPEED).id,)
    assert (row.tokens, row.cost_usd) == (42, 3.0)
    assert all(brief.holdout == () for brief in proposer.briefs)
    assert [(p.source, r.gate) for p, r in proposer.learnt if r.gate == "promoted"] == [
        (BY_SPEED, "promoted")
    ]


def test_parents_come_best_first_with_raced_candidates_among_them():
    proposer = Scripted([BY_SPEED], [])
    step(uneven_brief(), proposer)
    before, after = proposer.parents
    assert {p.name for p in before} == {"round-robin", "random"}
    assert after[0].id == verify(BY_SPEED).id
    assert after[0].gain > 0.0
    gains = [p.gain for p in after]
    assert gains == sorted(gains, reverse=True)


def test_of_two_that_act_alike_the_shorter_is_promoted():
    unused = "def ceiling(request, replica, fleet):\n    return 30000.0\n"
    row = step(uneven_brief(), Scripted([BY_SPEED + unused, BY_SPEED]))
    assert row.promoted == (verify(BY_SPEED).id,)
    (other,) = (c for c in row.candidates if c.verdict == "rejected")
    assert other.gate == "novelty"
    assert "exactly as the shorter" in other.reason


def test_known_policies_are_not_tried_again():
    brief = replace(uneven_brief(), known=(verify(BY_SPEED).id,))
    row = step(brief, Scripted([BY_SPEED]))
    assert [(c.gate, c.reason) for c in row.candidates] == [
        ("novelty", "the same policy is known already")
    ]


def test_a_proposer_that_repeats_itself_for_ever_is_bounded():
    brief = replace(uneven_brief(), max_candidates=50)
    row = step(brief, Scripted(*([[ROUND_ROBIN] * 30] * 100)))
    assert len(row.candidates) == 50
    assert row.promoted == ()


@pytest.mark.parametrize("budget_s", [60.0, 120.0, 250.0])
def test_the_budget_ends_the_cycle_at_any_point(budget_s):
    ticks = iter(range(10_000))
    brief = replace(uneven_brief(), budget_s=budget_s)
    row = step(brief, GeneticProposer(), clock=lambda: float(next(ticks)))
    assert row.seconds <= budget_s + 10
    assert all(c.reason for c in row.candidates)
    assert row.conclusion


def test_a_budget_too_small_for_the_incumbents_is_an_error_that_says_so():
    ticks = iter(range(10_000))
    row = step(
        replace(uneven_brief(), budget_s=3.0), GeneticProposer(), clock=lambda: float(next(ticks))
    )
    assert row.candidates == ()
    assert "spent on the incumbents" in row.error


def test_what_time_ran_out_for_is_not_learnt_as_decided():
    sources = [BY_SPEED.replace("in_flight", f) for f in ("in_flight", "running", "waiting")]
    left_over = 0
    for budget_s in (60.0, 80.0, 100.0):
        ticks = iter(range(10_000))
        proposer = Scripted(sources)
        brief = replace(uneven_brief(), budget_s=budget_s)
        row = step(brief, proposer, clock=lambda ticks=ticks: float(next(ticks)))
        undecided = [c for c in row.candidates if "ran out" in c.reason]
        assert len(proposer.learnt) == len(row.candidates) - len(undecided)
        left_over += len(undecided)
    assert left_over > 0


def test_a_brief_without_holdout_or_with_a_broken_incumbent_is_refused():
    with pytest.raises(BriefError, match="hold-out window"):
        step(uneven_brief().for_proposers(), GeneticProposer())
    broken = Incumbent("x", "def score(:", Origin.HUMAN, "broken")
    with pytest.raises(PolicyError):
        step(replace(uneven_brief(), incumbents=(broken,)), GeneticProposer())


def test_files_are_tried_once_per_content_and_get_a_verdict(tmp_path):
    brief = replace(uneven_brief(), synthesizer=Origin.FILES, folder=str(tmp_path))
    (tmp_path / "garbage.policy").write_bytes(b"\x00\xff please route better")
    (tmp_path / "mine.policy").write_text(BY_SPEED)
    row = step(brief, FilesProposer(tmp_path))
    assert row.promoted == (verify(BY_SPEED).id,)
    assert row.candidates[0].thought == "less work for slow replicas"
    garbage = row.candidates[1]
    assert (garbage.arm_id, garbage.gate) == ("", "verify")
    assert "not plain ASCII text" in garbage.reason
    assert "not plain ASCII" in (tmp_path / "garbage.verdict").read_text()
    assert "promoted" in (tmp_path / "mine.verdict").read_text()
    assert "regret above 0.05" in (tmp_path / "brief.md").read_text()
    assert step(brief, FilesProposer(tmp_path)).candidates == ()
    (tmp_path / "garbage.policy").write_text(BY_SPEED.replace("in_flight", "running"))
    (again,) = step(brief, FilesProposer(tmp_path)).candidates
    assert again.gate != "verify"


def test_a_killed_cycle_loses_no_file(tmp_path):
    (tmp_path / "mine.policy").write_text(BY_SPEED)
    brief, rng = uneven_brief(), np.random.default_rng(0)
    assert len(FilesProposer(tmp_path).propose(brief, [], 5, rng)) == 1
    assert len(FilesProposer(tmp_path).propose(brief, [], 5, rng)) == 1


def test_a_folder_that_cannot_be_used_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BriefError, match="name another folder"):
        FilesProposer(tmp_path / "file")
