"""A planner's new plan, improved replica by replica."""

import re

import hypothesis.strategies as st
from arms.slow_scenes import SEEDS, fleet, functions, gpu, option, window
from hypothesis import given, settings

from autopoiesis.arms.plan import Plan, ReplicaGroup
from autopoiesis.arms.plan_check import check
from autopoiesis.arms.slow import verify_slow
from autopoiesis.synthesis.slow_mutation import OPERATORS

MODELS = ("llama", "qwen")


def policy(planner="greedy", how="replica by replica", **constants):
    """Return the functions of a seed with its planner inside, these constants in place of its own."""
    text = dict(OPERATORS)[how](SEEDS[planner].policy.source, (), None)
    for name, value in constants.items():
        text, found = re.subn(f"^{name} = .*$", f"{name} = {value}", text, flags=re.MULTILINE)
        assert found == 1
    names = {"Plan": Plan, "ReplicaGroup": ReplicaGroup}
    exec(verify_slow(text).source, names)
    return names["should_reschedule"], names["schedule"]


def two_models(**values):
    ways = [option(model, rps=2.0, start_s=30.0) for model in MODELS]
    return fleet([gpu(available=8)], ways, MODELS, drain_s=5.0, stop_s=5.0, **values)


def counts(plan):
    return {group.model: group.replicas for group in plan.groups}


def plan_of(llama, qwen):
    return Plan((ReplicaGroup("llama", "H100", 1, llama), ReplicaGroup("qwen", "H100", 1, qwen)))


def test_it_decides_itself_when_and_stands_around_a_planner_once():
    asks, _ = policy()
    assert asks(window(), fleet(), Plan())
    climbing, staging = (dict(OPERATORS)[how] for how in ("replica by replica", "in stages"))
    made = climbing(SEEDS["greedy"].policy.source, (), None)
    assert climbing(made, (), None) == made
    staged = staging(SEEDS["greedy"].policy.source, (), None)
    assert staging(staged, (), None) == staged
    assert climbing(staged, (), None) == made


def test_replicas_move_to_the_model_that_would_be_done_last():
    _, schedule = policy(AFTER=0.0)
    much = window({"llama": 900.0, "qwen": 100.0}, unfinished=2000)
    assert counts(schedule(much, two_models(), plan_of(4, 4))) == {"llama": 7, "qwen": 1}


def test_what_runs_stays_where_a_change_would_end_too_late_to_pay():
    _, schedule = policy()
    little = window({"llama": 900.0, "qwen": 100.0}, unfinished=200)
    plan = plan_of(4, 4)
    assert schedule(little, two_models(), plan) is plan


def test_what_keeps_up_with_what_is_ahead_is_enough():
    _, schedule = policy(how="replica by replica, for what is to come")
    plan = plan_of(2, 6)
    assert schedule(window({"llama": 3.5, "qwen": 1.0}), two_models(), plan) is plan
    more = schedule(window({"llama": 9.0, "qwen": 1.0}), two_models(), plan)
    assert counts(more)["llama"] > 2


def test_gpus_that_are_gone_or_have_come_are_no_obstacle():
    _, schedule = policy()
    busy = window({"llama": 500.0, "qwen": 500.0}, unfinished=4000)
    fewer = two_models()._replace(gpus=(gpu(available=3),))
    assert not check(schedule(busy, fewer, plan_of(4, 4)), fewer)
    more = two_models()._replace(gpus=(gpu(available=12),))
    assert sum(counts(schedule(busy, more, plan_of(4, 4))).values()) == 12


@st.composite
def scenes(draw):
    types = draw(st.lists(st.sampled_from(["A", "B", "C"]), min_size=1, unique=True))
    gpus = [gpu(name, draw(st.integers(2, 20))) for name in types]
    nodes = [
        (f"{g.name}{i}", g.name, min(8, g.available - 8 * i))
        for g in gpus
        for i in range(-(-g.available // 8))
    ]
    models = MODELS[: draw(st.integers(1, 2))]
    ways = [
        option(model, g.name, width, rps, draw(st.floats(1.0, 90.0)))
        for model in models
        for g in gpus
        for width in (1, 2, 4)
        if (rps := draw(st.sampled_from([0.0, 0.5, 3.0, 7.0]))) or width == 1
    ]
    there = fleet(gpus, ways, models, nodes, minimum=draw(st.integers(0, 1)))
    loads = [
        window(
            {model: draw(st.floats(0.0, 200.0)) for model in models},
            unfinished=draw(st.integers(0, 5000)),
        )
        for _ in range(3)
    ]
    return there, loads


@settings(max_examples=60, deadline=None)
@given(scenes(), st.sampled_from(["greedy", "threshold"]))
def test_every_plan_can_be_carried_out_and_the_next_one_follows_from_it(scene, planner):
    there, loads = scene
    _, schedule = policy(planner)
    plan = Plan()
    for load in loads:
        wanted = schedule(load, there, plan)
        faults = check(wanted, there)
        assert not faults or check(functions(planner)[1](load, there, plan), there)
        plan = plan if faults else wanted
