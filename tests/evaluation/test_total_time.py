"""The total time of the paper: its parts, what changes cost, and whether the twin agrees."""

import ast
import itertools
import re
import time
from dataclasses import replace

import numpy as np
import pytest

from autopoiesis.arms.compiler import compile_policy
from autopoiesis.arms.language import verify
from autopoiesis.arms.migration import Order
from autopoiesis.arms.objective import Objective
from autopoiesis.arms.plan import Kind, Plan, ReplicaGroup
from autopoiesis.arms.seeds import seed_arms
from autopoiesis.evaluation import cluster as cluster_module
from autopoiesis.evaluation.bound import bound_s, usable
from autopoiesis.evaluation.cluster import (
    ELASTIC_CLUSTER,
    HOMOGENEOUS_CLUSTER,
    LARGE,
    PAPER_COSTS,
    REPLICA_COSTS,
    Batch,
    Cluster,
    Pool,
    batches,
    profile_of,
    rate_rps,
    uniform_batch,
)
from autopoiesis.evaluation.plan_view import features
from autopoiesis.evaluation.slow_contestants import Living, SlowEffort, fixed
from autopoiesis.evaluation.slow_policy import Answer, Loaded
from autopoiesis.evaluation.slow_search import child, policy_of, seeds, varied
from autopoiesis.evaluation.total_time import total_time
from autopoiesis.evaluation.workload import Workload, parts_of
from autopoiesis.synthesis.slow_mutation import NUMERIC, OPERATORS, vary_slow
from autopoiesis.twin.simulation import ReplicaSpec, SimCell, Simulation

SMALL = Cluster("small", (Pool("h100", 8),), ("llama-3.1-8b",))
WORK = Workload(SMALL, (Batch((3000.0,), 900.0, 20.0), Batch((1500.0,), 500.0, 200.0)), PAPER_COSTS)
NO_EFFORT = SlowEffort(8, 2)


def alone(name, work=WORK):
    return fixed(seeds()[name])(work, work, NO_EFFORT, 0).state


def width(wide, replicas):
    return Plan((ReplicaGroup("llama-3.1-8b", "h100", wide, replicas),))


def switching(first, then, at_step, order=Order.MINIMAL):
    """Decide for one plan, and for another at a step."""
    steps = iter(range(10_000))

    def decide(state, _window, _fleet):
        step = next(steps)
        plan = first if step == 0 else then if step == at_step else None
        return Answer(plan, 0.0), order

    return decide


@pytest.mark.parametrize("name", ["never", "greedy", "amortised", "minimal-migration"])
def test_the_parts_make_up_the_total(name):
    parts = parts_of(alone(name))
    whole = parts.pop("total_s")
    assert whole > 0.0
    assert sum(parts.values()) == pytest.approx(whole)


def test_a_policy_that_never_changes_pays_for_its_first_plan_alone():
    parts = parts_of(alone("never"))
    assert parts["stale_s"] == 0.0
    assert parts["reconfiguration_s"] == 0.0
    assert parts["scheduling_s"] > 0.0


def test_a_change_costs_what_the_replicas_lose_meanwhile():
    stay = total_time(WORK, switching(width(1, 8), None, 1))
    same = total_time(WORK, switching(width(1, 8), width(1, 8), 1))
    part = Plan(
        (
            ReplicaGroup("llama-3.1-8b", "h100", 1, 6, share=0.75),
            ReplicaGroup("llama-3.1-8b", "h100", 2, 1, share=0.25),
        )
    )
    some = total_time(WORK, switching(width(1, 8), part, 1))
    full = total_time(WORK, switching(width(1, 8), part, 1, Order.FULL))
    assert same.now_s == stay.now_s  # nothing differs, nothing moves
    assert same.reschedulings == 0
    assert stay.now_s < some.now_s < full.now_s
    assert full.spent["reconfiguration_s"] > 0.0


def test_replicas_of_their_own_cost_take_longer_to_come_than_weights_over_pcie():
    change = switching(width(1, 8), width(2, 4), 1)
    paper = total_time(WORK, change)
    replica = total_time(replace(WORK, costs=REPLICA_COSTS), switching(width(1, 8), width(2, 4), 1))
    assert replica.spent["reconfiguration_s"] > paper.spent["reconfiguration_s"] > 0.0


def test_a_fleet_in_the_twin_takes_as_long_as_the_sum_of_its_replicas_rates():
    plan = ReplicaGroup("llama-3.1-8b", "h100", 1, 4)
    n, lengths = 6000, (700.0, 120.0)
    predicted_s = n / (4 * rate_rps(plan.kind, *lengths))
    engine = profile_of(plan.model, plan.gpu, plan.tensor_parallel)
    engine = replace(
        engine, max_num_seqs=plan.max_num_seqs, max_num_batched_tokens=plan.max_num_batched_tokens
    )
    fleet = [ReplicaSpec(f"r{i}", engine) for i in range(4)]
    arm = next(a for a in seed_arms() if a.name == "least-requests")
    simulation = Simulation(uniform_batch(n, *lengths, seed=1), fleet, Objective(), 0)
    simulation.allocate(
        [SimCell(compile_policy(verify(arm.source)), tuple(range(4)), tuple(range(64)))]
    )
    simulation.advance(np.inf)
    assert np.nanmax(simulation.outcome().finished_s) == pytest.approx(predicted_s, rel=0.08)


def test_gpus_that_go_take_their_replicas_with_them():
    work = Workload(ELASTIC_CLUSTER, batches("spotserve-1", ELASTIC_CLUSTER, 0), PAPER_COSTS)
    state = alone("never", work)
    used = sum(i.kind.tensor_parallel for i in state.instances)
    assert used <= 24  # all it ever had
    follows = alone("minimal-migration", work)
    assert follows.now_s < state.now_s


def test_policies_see_no_output_length_before_anything_has_finished():
    state = total_time(replace(WORK, batches=WORK.batches[:1]), switching(width(1, 8), None, 1))
    state.phase, state.left, state.output_tokens = 0, (10.0,), 77.0
    window, fleet = features(WORK, state)
    assert window.output_tokens_mean == 77.0
    assert fleet.gpus[0].available == 8


def test_another_future_changes_nothing_before_it():
    other = replace(WORK, batches=(WORK.batches[0], Batch((9000.0,), 50.0, 600.0)))
    lasted = [Living()(work, WORK, NO_EFFORT, 0).state.lasted_s[0] for work in (WORK, other)]
    # Thinking is measured CPU time, so the two are not equal to the last digit.
    assert lasted[0] == pytest.approx(lasted[1], rel=0.1)


def test_every_child_is_a_policy_and_the_search_reaches_all_kinds_of_change():
    rng = np.random.default_rng(0)
    parents = [*seeds().values()]
    made = [child(parents, rng) for _ in range(40)]
    for genome in made:
        policy_of(genome)  # verified and loaded
    assert len({*made} - {*parents}) > 30
    assert len({genome.name.partition(": ")[2] for genome in made}) > 5
    assert {genome.seed for genome in made} <= {*seeds()}


def test_tuning_changes_numbers_and_nothing_else():
    rng = np.random.default_rng(1)
    threshold = seeds()["threshold"]
    tuned = {varied([threshold], rng) for _ in range(30)} - {threshold}
    assert len(tuned) > 15
    for genome in tuned:
        assert shape(threshold) <= shape(genome)


def shape(genome):
    """The lines of a policy with every number written as 0."""
    text = ast.unparse(ast.parse(genome.source))
    return {re.sub(r"[0-9.]+", "0", line) for line in text.splitlines()}


def test_the_batch_limits_of_a_policy_are_those_of_its_plan():
    rng = np.random.default_rng(2)
    limits = tuple(known for known in NUMERIC if known[0] == "other batch limits")
    greedy = seeds()["greedy"]
    made = vary_slow(vary_slow(greedy.source, (), rng, limits)[0].source, (), rng, limits)[0]
    genome = replace(greedy, source=made.source)
    wanted = {n: int(v) for n, v in re.findall(r"^(MAX_\w+) = (\d+)$", made.source, re.MULTILINE)}
    work = Workload(HOMOGENEOUS_CLUSTER, (Batch((100.0,), 500.0, 50.0),), PAPER_COSTS)
    state = fixed(genome)(work, work, NO_EFFORT, 0).state
    kinds = {(k.model, k.max_num_seqs, k.max_num_batched_tokens) for k in state.plan.kinds()}
    assert kinds == {(LARGE, wanted["MAX_SEQS"], wanted["MAX_TOKENS"])}
    assert wanted != {"MAX_SEQS": 256, "MAX_TOKENS": 8192}


@pytest.mark.parametrize("cluster", [SMALL, replace(SMALL, models=("llama-3.1-8b", "llama-2-13b"))])
def test_nobody_is_faster_than_the_bound(cluster):
    parts = len(cluster.models)
    phases = tuple(
        replace(batch, requests=tuple(batch.requests[0] / parts for _ in range(parts)))
        for batch in WORK.batches
    )
    work = replace(WORK, cluster=cluster, batches=phases)
    times = [alone(name, work).now_s for name in ("never", "greedy", "milp")]
    assert 0.4 * min(times) < bound_s(work) < min(times)


def test_what_measuring_replicas_takes_is_nobodys_thinking(monkeypatch):
    def slow(*_asked):
        until_s = time.process_time() + 0.3
        while time.process_time() < until_s:
            pass
        return 10.0

    monkeypatch.setattr(cluster_module, "_measured_rps", slow)
    odd = replace(WORK, batches=(Batch((40.0,), 3456.0, 78.0),))
    spent = Living(evolves=False)(odd, odd, NO_EFFORT, 0).spent
    cluster_module._rate_rps.cache_clear()
    assert spent.cycles == 0 or spent.cpu_s < 0.3


@pytest.mark.parametrize("how", ["in stages", "replica by replica"])
def test_a_plan_taken_over_as_far_as_it_pays_is_faster_than_the_planner_inside_it(how):
    """Two models whose shares swap between phases: to move all at every step costs more than it earns."""
    rng = np.random.default_rng(3)
    staged = tuple(known for known in OPERATORS if known[0] == how)
    greedy = seeds()["greedy"]
    made, _ = vary_slow(greedy.source, (), rng, staged)
    assert vary_slow(made.source, (), rng, staged) is None  # once is enough
    two = Cluster("two", (Pool("h100", 8), Pool("a100", 8)), ("llama-3.1-8b", "llama-2-13b"))
    phases = tuple(Batch((a, 4000.0 - a), 900.0, 60.0) for a in (3000.0, 1000.0, 3000.0))
    work = Workload(two, phases, REPLICA_COSTS)
    plain, careful = (
        fixed(genome)(work, work, NO_EFFORT, 0).state
        for genome in (greedy, replace(greedy, source=made.source))
    )
    assert careful.faults == 0
    assert careful.now_s < plain.now_s
    assert bound_s(work) < careful.now_s


def test_who_is_in_charge_changes_only_by_a_swap(monkeypatch):
    asked = []
    decide = Loaded.decide

    def noted(policy, window, fleet, plan):
        asked.append(policy)
        return decide(policy, window, fleet, plan)

    monkeypatch.setattr(Loaded, "decide", noted)
    two = Cluster("two", (Pool("h100", 8), Pool("a100", 8)), ("llama-3.1-8b", "llama-2-13b"))
    phases = tuple(Batch((a, 2e4 - a), 900.0, 60.0) for a in (15e3, 5e3, 15e3, 5e3))
    work = Workload(two, phases, REPLICA_COSTS)
    done = Living()(work, work, SlowEffort(20, 4), 0)
    assert done.spent.cycles > 3
    changes = sum(a is not b for a, b in itertools.pairwise(asked))
    assert changes == done.promoted


def test_gpus_that_come_later_serve_in_the_bound_only_once_they_are_loaded():
    start_s = PAPER_COSTS.start_s(Kind(LARGE, "a100", 4, 256, 8192, "serve"))
    assert usable(ELASTIC_CLUSTER, 0.0, start_s) == [24.0]
    there = [ELASTIC_CLUSTER.available("a100", at_s) for at_s in np.arange(0.0, 60.0, 0.5)]
    for at_s in np.arange(0.0, 60.0, 1.0):
        until = int(at_s * 2) + 1
        since = max(int((at_s - start_s) * 2) + 1, 0)
        assert usable(ELASTIC_CLUSTER, at_s, start_s)[0] <= min(there[since:until])
