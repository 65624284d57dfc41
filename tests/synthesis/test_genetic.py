"""Every proposal is a policy; variation is rich, repeatable and typed."""

import ast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthesis_scenes import ROUND_ROBIN, incumbent

from autopoiesis.arms import features
from autopoiesis.arms.language import PolicyError, verify
from autopoiesis.synthesis import vocabulary
from autopoiesis.synthesis.genetic import GeneticProposer
from autopoiesis.synthesis.mutation import OPERATORS, fresh_function, functions, sites
from autopoiesis.synthesis.proposer import Parent

RICH = """
def score(request, replica, fleet):
    load = replica.in_flight / max(replica.speed, 0.1)
    if replica.kv_usage > 0.9 and not fleet.held < 1.0:
        return load + 100.0
    return load - 0.002 * replica.prefix_hit_tokens if request.input_tokens > 512.0 else load

def admit(request, fleet):
    return request.slack_s + 2.0

def priority(request, fleet):
    return request.input_tokens - 50.0 * request.waited_s

def ceiling(request, replica, fleet):
    return 48.0 * replica.speed
"""


class _Brief:
    """What the genetic proposer reads of a brief."""

    incumbents = (incumbent("round-robin", ROUND_ROBIN),)
    known = ()


def parents() -> list[Parent]:
    return [
        Parent(p.id, p.source, name, 0.0)
        for name, p in (("rich", verify(RICH)), ("round-robin", verify(ROUND_ROBIN)))
    ]


def propose(n: int, seed: int, from_: list[Parent] | None = None):
    return GeneticProposer().propose(_Brief, from_ or parents(), n, np.random.default_rng(seed))


@given(st.integers(0, 2**32))
@settings(max_examples=6, deadline=None)
def test_every_proposal_verifies_and_all_differ(seed):
    proposals = propose(30, seed)
    ids = [verify(p.source).id for p in proposals]
    assert len(proposals) == 30
    assert len(set(ids)) == 30
    assert not {p.id for p in parents()} & set(ids)


def test_proposals_are_canonical_and_name_their_parents():
    known = {p.id for p in parents()}
    for proposal in propose(60, 3):
        assert verify(proposal.source).source == proposal.source
        assert proposal.parents
        assert set(proposal.parents) <= known
        assert proposal.thought
        assert proposal.tokens == 0


def test_same_seed_same_proposals():
    assert propose(40, 9) == propose(40, 9)
    assert propose(40, 9) != propose(40, 10)


def test_a_proposer_never_repeats_itself_over_generations():
    proposer, rng = GeneticProposer(), np.random.default_rng(0)
    sources = [p.source for _ in range(6) for p in proposer.propose(_Brief, parents(), 24, rng)]
    assert len(sources) == len(set(sources)) == 144


def test_variation_stays_valid_and_bounded_over_many_generations():
    rng = np.random.default_rng(4)
    line = parents()
    for _ in range(25):
        born = GeneticProposer().propose(_Brief, line, 6, rng)
        assert len(born) == 6
        line = [Parent(verify(p.source).id, p.source, "child", None) for p in born]
    assert all(sum(1 for _ in ast.walk(ast.parse(p.source))) <= 400 for p in line)


@pytest.mark.parametrize(("what", "operator"), [(what, o) for _, what, o in OPERATORS])
def test_each_operator_changes_policies_into_policies(what, operator):
    rng = np.random.default_rng(1)
    changed = verified = 0
    for _ in range(24):
        tree = ast.parse(verify(RICH).source)
        other = ast.parse(verify(ROUND_ROBIN).source)
        if operator(tree, [other], rng):
            changed += 1
            try:
                verified += (
                    verify(ast.unparse(ast.fix_missing_locations(tree))).id != verify(RICH).id
                )
            except PolicyError:
                continue
    assert changed > 20, what
    assert verified >= 0.75 * changed, what


def test_values_and_conditions_are_told_apart():
    found = sites(ast.parse(RICH))
    assert {s.function for s in found} == {"score", "admit", "priority", "ceiling"}
    assert not any(isinstance(s.value, ast.Compare | ast.BoolOp) for s in found)
    texts = {ast.unparse(s.value) for s in found}
    assert {"replica.kv_usage", "0.9", "fleet.held", "load", "max(replica.speed, 0.1)"} <= texts
    assert not {"replica", "max"} & texts


def test_the_vocabulary_covers_every_feature_once():
    declared = {
        f"{parameter}.{field}"
        for parameter, (kind, _) in features.INPUTS.items()
        for field in kind._fields
    }
    listed = [name for names in vocabulary.UNITS.values() for name in names]
    assert sorted(listed) == sorted(declared)
    assert set(vocabulary.USUAL) == set(vocabulary.UNITS)


def test_what_the_twin_cannot_judge_is_never_written_in():
    line, rng = parents(), np.random.default_rng(8)
    for _ in range(8):
        born = GeneticProposer().propose(_Brief, line, 16, rng)
        assert not [p.source for p in born if any(name in p.source for name in vocabulary.UNTRIED)]
        line = [Parent(verify(p.source).id, p.source, "child", None) for p in born]


@given(st.sampled_from(list(features.FUNCTIONS)), st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_functions_written_anew_verify(name, seed):
    tree = ast.parse(ROUND_ROBIN)
    made = vocabulary.random_function(name, np.random.default_rng(seed))
    tree.body = list(({**functions(tree), name: made}).values())
    assert name in verify(ast.unparse(ast.fix_missing_locations(tree))).functions


def test_whatever_is_said_of_held_requests_comes_with_a_ceiling_that_holds_them():
    rng = np.random.default_rng(3)
    for _ in range(100):
        tree = ast.parse(ROUND_ROBIN)
        fresh_function(tree, (), rng)
        names = set(functions(tree))
        assert "ceiling" in names or not names & {"admit", "priority"}
