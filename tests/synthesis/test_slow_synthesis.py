"""Slow functions evolve together with the fast ones, on fleets whose GPUs come and go."""

import ast
import itertools
from dataclasses import replace

import numpy as np
import pytest

from autopoiesis.arms.arm import Kind, Origin
from autopoiesis.arms.objective import Objective
from autopoiesis.arms.parts import parts_of
from autopoiesis.arms.seeds import seed_arms, slow_seed_arms, slow_seeds
from autopoiesis.arms.slow import verify_slow
from autopoiesis.orchestrator.yards import cut_with_capacity, paired, ways_of
from autopoiesis.synthesis.archive import Archive, from_archive
from autopoiesis.synthesis.brief import Brief, BriefError
from autopoiesis.synthesis.genetic import GeneticProposer
from autopoiesis.synthesis.letter import letter, request
from autopoiesis.synthesis.proposer import Parent, Proposal
from autopoiesis.synthesis.slow_mutation import OPERATORS, vary_slow
from autopoiesis.synthesis.step import promoted_arms, step
from autopoiesis.synthesis.tuner import TuningProposer
from autopoiesis.twin.capacity_trace import CapacityTrace
from autopoiesis.twin.latency import profile
from autopoiesis.twin.simulation import ReplicaSpec
from autopoiesis.twin.speed import conversations

SEEDS = {seed.name: seed.policy.source for seed in slow_seeds()}
NARROW = profile("h100-llama-3-8b-tp1-bf16")
FAST = [arm for arm in seed_arms() if arm.name in {"least-requests", "round-robin"}]
SLOW = [arm for arm in slow_seed_arms() if arm.name in {"never", "threshold"}]


def brief(**fields) -> Brief:
    """Ask for plans where GPUs come in every window: to keep the first plan is bad."""
    trace = conversations(3600, 3, 60.0)
    comes = [(12.0 * k + at_s, gpus) for k in range(5) for at_s, gpus in ((0.0, 2), (3.0, 4))]
    capacity = CapacityTrace(*map(np.array, zip(*comes, strict=True)), "spot")
    windows, holdout, yards = cut_with_capacity(trace, capacity, [NARROW], 4, 1.0)
    yards = tuple(
        replace(yard, load_s=1.0, engine_s=1.0, drain_s=1.0, stop_s=0.5) for yard in yards
    )
    given = {
        "trigger": "test",
        "objective": Objective(0.5, 0.015),
        "replicas": tuple(ReplicaSpec(f"r{i}", NARROW) for i in range(4)),
        "windows": windows,
        "holdout": holdout,
        "incumbents": paired(FAST, SLOW),
        "seed": 1,
        "budget_s": 300.0,
        "warmup_s": 1.0,
        "yards": yards,
        "max_candidates": 12,
    }
    return Brief(**{**given, **fields})


def looks():
    """Return a clock on which each look takes a second: budgets that no machine changes."""
    return itertools.count(0.0, 1.0).__next__


# --- variation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEEDS)
def test_what_variation_makes_of_slow_policies_verifies_and_is_new(name: str) -> None:
    rng = np.random.default_rng(7)
    mates = [text for other, text in SEEDS.items() if other != name]
    made = [vary_slow(SEEDS[name], mates, rng) for _ in range(40)]
    policies = [policy for policy, _ in filter(None, made)]
    assert len(policies) > 30
    assert all(policy.source != SEEDS[name] for policy in policies)
    assert len({policy.id for policy in policies}) > 15
    assert len({what for _, what in filter(None, made)}) >= 4


def test_every_operator_works_and_its_result_can_be_varied_again() -> None:
    rng = np.random.default_rng(8)
    text = SEEDS["amortised"]
    for _, operator in OPERATORS * 3:
        made = operator(text, [SEEDS["milp"], SEEDS["minimal-migration"]], rng)
        assert made is not None
        text = verify_slow(made).source


def test_a_trigger_is_taken_over_with_what_it_needs_and_nothing_is_mixed_up() -> None:
    exchange = dict(OPERATORS)["another trigger"]
    made = exchange(SEEDS["greedy"], [SEEDS["amortised"]], np.random.default_rng(0))
    names = {node.name for node in ast.parse(made).body if isinstance(node, ast.FunctionDef)}
    assert names == {"schedule", "served_rps", "should_reschedule"}
    clash = SEEDS["threshold"].replace("TOLERANCE", "HEADROOM")  # 0.1, and the planner's is 1.3
    made = exchange(SEEDS["greedy"], [clash], np.random.default_rng(0))
    constants = {
        node.targets[0].id: node.value.value
        for node in ast.parse(made).body
        if isinstance(node, ast.Assign)
    }
    assert constants["HEADROOM"] == 1.3
    assert constants["HEADROOM_2"] == 0.1
    assert "HEADROOM_2" in ast.unparse(ast.parse(made).body[-1])


def test_the_genetic_proposer_varies_fast_and_slow_functions_where_plans_are_judged() -> None:
    asked = brief()
    parents = [Parent(i.arm_id, i.source, i.name, 0.0, slow=i.slow) for i in asked.incumbents]
    proposals = GeneticProposer().propose(
        asked.for_proposers(), parents, 30, np.random.default_rng(2)
    )
    assert len(proposals) == 30
    halves = [parts_of(proposal.source) for proposal in proposals]
    assert all(fast and verify_slow(slow) for fast, slow in halves)
    known_fast, known_slow = (
        {i.source for i in asked.incumbents},
        {i.slow for i in asked.incumbents},
    )
    assert any(fast.strip() + "\n" not in known_fast for fast, _ in halves)
    assert any(verify_slow(slow).source not in known_slow for _, slow in halves)


# --- cycles -----------------------------------------------------------------------------------------


class Given:
    """A proposer that proposes once what it was given."""

    origin = Origin.FILES

    def __init__(self, *sources: str) -> None:
        from autopoiesis.synthesis.proposer import Account

        self.account = Account()
        self._sources = list(sources)

    def propose(self, brief, parents, n, rng):
        assert all(parent.slow for parent in parents)
        assert len(brief.yards) == len(brief.windows)  # nothing of the hold-out
        sources, self._sources = self._sources, []
        return [Proposal(source, self.origin) for source in sources]

    def learn(self, verdicts):
        pass


FILL = """
def should_reschedule(window, fleet, plan):
    used = sum(group.gpus for group in plan.groups)
    return fleet.lost > 0 or used < fleet.gpus[0].available

def schedule(window, fleet, plan):
    option = fleet.options[0]
    count = fleet.gpus[0].available // option.tensor_parallel
    return Plan([ReplicaGroup(option.model, option.gpu, option.tensor_parallel, count)])
"""


@pytest.fixture(scope="module")
def cycle():
    fast = FAST[0].source
    crashes = FILL.replace("return fleet.lost", "raise ValueError(window)\n    return fleet.lost")
    asked = brief(incumbents=paired(FAST, [a for a in SLOW if a.name == "never"]))
    archive = Archive()
    row = step(
        asked,
        Given(fast + FILL, fast, fast + FILL.replace("should_", "might_"), fast + crashes),
        clock=looks(),
        archive=archive,
    )
    return asked, row, archive


def test_a_planner_that_uses_what_there_is_beats_one_that_does_not(cycle) -> None:
    asked, row, _ = cycle
    assert row.error == ""
    gates = {c.gate for c in row.candidates if c.verdict == "promoted"}
    assert gates & {"promoted", "tuned"}, row.conclusion
    (arm, *_) = promoted_arms(row, 5.0)
    assert arm.kind is Kind.BOTH
    assert "used < fleet.gpus[0].available" in arm.slow
    assert row.candidates[0].gain > 0.01
    assert row.beaten in {i.arm_id for i in asked.incumbents}


def test_fast_functions_alone_and_half_a_slow_policy_are_refused(cycle) -> None:
    _, row, _ = cycle
    reasons = [c.reason for c in row.candidates if c.gate == "verify"]
    assert "its slow functions are missing" in reasons
    assert any("`should_reschedule` is missing" in reason for reason in reasons)


def test_a_planner_that_fails_serves_on_with_the_first_plan(cycle) -> None:
    _, row, _ = cycle
    (failing,) = [c for c in row.candidates if "raise ValueError" in c.slow]
    assert failing.verdict == "rejected"
    assert failing.gain == pytest.approx(0.0, abs=1e-9)


def test_what_is_bred_is_archived_with_its_slow_functions_and_not_for_a_fixed_fleet(
    cycle, tmp_path
) -> None:
    asked, _, archive = cycle
    file = tmp_path / "archive.json"
    archive.save(file)
    (regime,) = Archive.open(file).regimes
    assert regime.gpus == "h100 x1, coming and going"
    again, remark = from_archive(replace(asked, archived=("given",)), file)
    assert remark == ""
    *bred, given = again.archived
    assert given == "given"
    assert any("used < fleet.gpus[0].available" in parts_of(source)[1] for source in bred)
    fixed = replace(
        asked, yards=(), incumbents=tuple(replace(i, slow="") for i in asked.incumbents)
    )
    assert from_archive(fixed, file)[0].archived == ()


class Plainly(Given):
    """The same where the fleet is fixed."""

    def propose(self, brief, parents, n, rng):
        sources, self._sources = self._sources, []
        return [Proposal(source, self.origin) for source in sources]


def test_slow_functions_have_no_place_in_a_cycle_on_a_fixed_fleet() -> None:
    asked = brief()
    fixed = replace(
        asked, yards=(), incumbents=tuple(replace(i, slow="") for i in asked.incumbents[:1])
    )
    row = step(fixed, Plainly(FAST[0].source + FILL), clock=looks())
    assert [c.reason for c in row.candidates] == [
        "its slow functions have no place where the fleet is fixed"
    ]


def test_evolution_and_tuning_run_with_planners() -> None:
    row = step(brief(budget_s=150.0), GeneticProposer(), clock=looks())
    assert row.error == ""
    assert len(row.candidates) > 3
    assert all(c.slow for c in row.candidates if c.gate != "verify")
    asked = brief(budget_s=40.0, incumbents=paired(FAST[:1], SLOW[:1]))
    parents = [Parent(i.arm_id, i.source, i.name, 0.0, slow=i.slow) for i in asked.incumbents]
    tuned = TuningProposer(looks()).propose(
        asked.for_proposers(), parents, 1, np.random.default_rng(1)
    )
    assert all(verify_slow(parts_of(t.source)[1]).source == SLOW[0].slow for t in tuned)


def test_a_letter_tells_of_slow_functions_where_they_are_judged() -> None:
    asked = brief()
    parents = [Parent(i.arm_id, i.source, i.name, 0.0, slow=i.slow) for i in asked.incumbents]
    for text in (letter(asked, parents), "\n".join(m.content for m in request(asked, parents, 2))):
        assert "## Slow functions" in text
        assert "windows_since_rescheduling" in text
        assert parents[0].slow.strip() in text
    fixed = replace(
        asked, yards=(), incumbents=tuple(replace(i, slow="") for i in asked.incumbents)
    )
    assert "## Slow functions" not in letter(fixed, [replace(p, slow="") for p in parents])


def test_policies_that_say_nothing_in_an_idle_fleet_are_refused() -> None:
    asked = brief()
    fixed = replace(
        asked, yards=(), incumbents=tuple(replace(i, slow="") for i in asked.incumbents[:1])
    )
    source = "def score(request, replica, fleet):\n    return 1 / replica.in_flight\n"
    row = step(fixed, Plainly(source), clock=looks())
    (only,) = row.candidates
    assert only.gate == "verify"
    assert "all its scores are infinite in" in only.reason


# --- briefs -----------------------------------------------------------------------------------------


def test_a_brief_with_yards_travels_whole() -> None:
    asked = brief()
    again = Brief.from_bytes(asked.to_bytes())
    assert again.yards == asked.yards
    assert again.incumbents == asked.incumbents
    assert len(asked.yards) == len(asked.windows) + len(asked.holdout)
    with pytest.raises(BriefError, match="one for each window"):
        replace(asked, yards=asked.yards[:1])
    with pytest.raises(BriefError, match="has no slow functions"):
        replace(asked, incumbents=(replace(asked.incumbents[0], slow=""),))


def test_each_window_has_the_gpus_of_its_time() -> None:
    trace = conversations(4000, 3, 40.0)
    capacity = CapacityTrace(np.array([0.0, 30.0, 31.0]), np.array([8, 2, 4]), "spot")
    windows, holdout, yards = cut_with_capacity(trace, capacity, [NARROW], 8, 1.0)
    starts = {w.name: 12.0 * int(w.name.split("[")[1][:-1]) for w in (*windows, *holdout)}
    for window, yard in zip((*windows, *holdout), yards, strict=True):
        for at_s in (0.0, 5.0, 6.5, 11.9):
            now_s = starts[window.name] + at_s
            wanted = 8 if now_s < 30.0 else 2 if now_s < 31.0 else 4
            assert yard.gpus[0].at(at_s) == wanted
        assert yard.first.gpus() == {"h100": yard.gpus[0].at(0.0)}


def test_profiles_say_which_gpus_and_how_many() -> None:
    model, ways = ways_of([NARROW, profile("h100-llama-3-8b-tp2-bf16")])
    assert (model, [(w.gpu, w.tensor_parallel) for w in ways]) == (
        "llama-3-8b",
        [("h100", 1), ("h100", 2)],
    )
    with pytest.raises(BriefError, match="Plans are made for one model"):
        ways_of([replace(NARROW, name="mine")])
