"""Slow policies at work in the twin: each human one replans as its origin does, and pays for it."""

from dataclasses import replace

import numpy as np
import pytest

from autopoiesis.arms import plan as plan_module
from autopoiesis.arms.compiler import compile_policy
from autopoiesis.arms.language import verify
from autopoiesis.arms.objective import Objective
from autopoiesis.arms.plan import Plan, ReplicaGroup
from autopoiesis.arms.sandbox.slow_arm import Answer, SlowArm, SlowFault
from autopoiesis.arms.seeds import seed_arms, slow_seeds
from autopoiesis.twin.latency import profile
from autopoiesis.twin.outcome import Status
from autopoiesis.twin.planned import Planned, serve_planned
from autopoiesis.twin.simulation import ReplicaSpec, run_arm
from autopoiesis.twin.speed import conversations
from autopoiesis.twin.trace import Trace
from autopoiesis.twin.yard import GpuCourse, Way, Yard, capacity_rps, yard_from_plain, yard_to_plain

SEEDS = {seed.name: seed.policy for seed in slow_seeds()}
PROGRAM = compile_policy(
    verify(next(arm.source for arm in seed_arms() if arm.name == "least-requests"))
)
MODEL = "llama-3-8b"
NARROW = Way("h100", 1, profile("h100-llama-3-8b-tp1-bf16"))
WIDE = Way("h100", 2, profile("h100-llama-3-8b-tp2-bf16"))
OBJECTIVE = Objective(1.0, 0.02)
RATE = 1.3 * capacity_rps(NARROW.profile, 1195.0, 202.0, OBJECTIVE)
"""Requests that one replica and a part of another serve within the objectives [1/s]."""


class Plain:
    """A slow policy run here, without a sandbox; each plan takes `thinks_s`."""

    def __init__(self, source: str, thinks_s: float = 0.0) -> None:
        names = {"Plan": plan_module.Plan, "ReplicaGroup": plan_module.ReplicaGroup}
        exec(source, names)
        self._functions = names
        self._thinks_s = thinks_s

    def should_reschedule(self, *told) -> Answer[bool]:
        return Answer(bool(self._functions["should_reschedule"](*told)), 0.0, 0.0)

    def schedule(self, *told) -> Answer[Plan]:
        return Answer(self._functions["schedule"](*told), self._thinks_s, self._thinks_s)


def yard(at_s=(0.0,), gpus=(8,), replicas=4, ways=(NARROW,), **times) -> Yard:
    first = Plan([ReplicaGroup(MODEL, "h100", ways[0].tensor_parallel, replicas)])
    course = GpuCourse("h100", at_s, gpus)
    return Yard(
        MODEL, ways, (course,), first, **{"load_s": 6.0, "engine_s": 4.0, "drain_s": 4.0, **times}
    )


def traffic(*phases: tuple[float, float]) -> Trace:
    """Make traffic of phases (seconds, times `RATE`) one after the other."""
    pieces, start_s = [], 0.0
    for i, (seconds, times) in enumerate(phases):
        made = conversations(int(2 * seconds * RATE * times), i, RATE * times).slice(0.0, seconds)
        pieces.append(replace(made, arrival_s=made.arrival_s + start_s))
        start_s += seconds
    names = (
        "arrival_s",
        "input_tokens",
        "output_tokens",
        "max_output_tokens",
        "session",
        "priority",
    )
    columns = {name: np.concatenate([getattr(p, name) for p in pieces]) for name in names}
    n = len(columns["arrival_s"])
    return Trace(**columns, block_start=np.zeros(n + 1, np.int64), blocks=np.zeros(0, np.int64),
                 block_tokens=512, name="phases")  # fmt: skip


STEADY, RISING = ((120.0, 2.0),), ((60.0, 1.0), (120.0, 5.0))


def serve(name: str, phases, there: Yard, thinks_s: float = 0.0) -> Planned:
    return serve_planned(
        traffic(*phases), PROGRAM, Plain(SEEDS[name].source, thinks_s), there, OBJECTIVE, 3
    )


def asked_at(planned: Planned) -> list[float]:
    return [plan.at_s for plan in planned.plans]


def replicas(plan: Plan | None) -> int:
    return sum(group.replicas for group in plan.groups) if plan else 0


def test_never_keeps_its_plan_whatever_comes() -> None:
    planned = serve("never", RISING, yard((0.0, 30.0), (8, 6)))
    assert planned.plans == ()
    assert planned.changing_s == 0.0
    assert planned.gpu_seconds == pytest.approx(4 * 180.0, rel=0.02)


def test_greedy_replans_after_every_window_in_which_nothing_is_changing() -> None:
    assert asked_at(serve("greedy", STEADY, yard())) == [10.0 * k for k in range(1, 12)]


def test_periodic_replans_every_six_windows() -> None:
    assert asked_at(serve("periodic", ((200.0, 2.0),), yard())) == [60.0, 120.0, 180.0]


def test_threshold_replans_when_the_load_leaves_its_band_and_not_soon_again() -> None:
    planned = serve("threshold", RISING, yard(replicas=2))
    told = {10.0 * (k + 1): w for k, w in enumerate(planned.windows)}
    for at_s in asked_at(planned):
        assert told[at_s].windows_since_rescheduling >= 3
        assert abs(told[at_s].utilisation / 0.75 - 1.0) > 0.1
    out = [
        at_s for at_s, w in told.items() if at_s >= 30.0 and abs(w.utilisation / 0.75 - 1.0) > 0.1
    ]
    assert asked_at(planned)[0] == out[0]
    assert 70.0 in asked_at(planned) or 80.0 in asked_at(planned) or 90.0 in asked_at(planned)
    assert replicas(planned.plans[-1].plan) > 4


def test_threshold_replans_when_replicas_are_lost() -> None:
    lost = serve("threshold", ((120.0, 1.0),), yard((0.0, 22.0), (2, 1), replicas=2))
    assert asked_at(lost)[0] == 30.0


def test_amortised_replans_where_more_is_served_for_long_enough() -> None:
    worth_it = serve("amortised", RISING, yard(replicas=2, stable_s=600.0))
    assert asked_at(worth_it)[0] in {70.0, 80.0}
    assert replicas(worth_it.plans[0].plan) > 2
    assert serve("amortised", RISING, yard(replicas=2, stable_s=5.0)).plans == ()
    assert serve("amortised", STEADY, yard(replicas=8)).plans == ()


def test_milp_takes_the_cheapest_way_that_serves_the_demand() -> None:
    planned = serve("milp", ((60.0, 0.3), (90.0, 3.0)), yard(replicas=1, ways=(NARROW, WIDE)))
    made = next(p for p in planned.plans if p.at_s > 60.0)
    plan, window = made.plan, planned.windows[round(made.at_s / 10.0) - 1]
    assert plan is not None
    needed = 1.3 * window.arrival_rate_rps
    lengths = window.input_tokens_mean, window.output_tokens_mean
    serves = {
        way.tensor_parallel: capacity_rps(way.profile, *lengths, OBJECTIVE)
        for way in (NARROW, WIDE)
    }
    ways = [
        (n + 2 * w)
        for n in range(9)
        for w in range((8 - n) // 2 + 1)
        if n * serves[1] + w * serves[2] >= needed
    ]
    assert sum(group.gpus for group in plan.groups) == min(ways, default=8)


def test_full_and_minimal_migration_act_when_gpus_come_or_go_and_only_then() -> None:
    coming = yard((0.0, 35.0, 95.0), (6, 4, 8), replicas=3, ways=(WIDE, NARROW))
    for name in ("full-migration", "minimal-migration"):
        planned = serve(name, ((160.0, 4.0),), coming)
        assert {40.0, 100.0} <= set(asked_at(planned))
        quiet = [at_s for at_s in asked_at(planned) if at_s in {10.0, 20.0, 30.0}]
        assert quiet == []
    minimal = serve("minimal-migration", ((160.0, 4.0),), coming).plans[-1].plan
    assert minimal is not None
    assert {group.tensor_parallel for group in minimal.groups} >= {2}  # what ran stayed


def test_a_fleet_that_stays_serves_as_one_without_a_planner() -> None:
    trace = traffic(*STEADY)
    there = yard(gpus=(4,))
    planned = serve_planned(trace, PROGRAM, Plain(SEEDS["never"].source), there, OBJECTIVE, 3)
    specs = [there.spec(there.first.groups[0].kind, f"r{i}") for i in range(4)]
    alone = run_arm(trace, specs, PROGRAM, OBJECTIVE, 3)
    limits = planned.outcome.finished_s, alone.finished_s
    np.testing.assert_allclose(*limits)
    assert np.all(planned.outcome.replica < 4)


def test_thinking_and_changing_cost_time_in_which_the_old_plan_serves() -> None:
    there = yard(replicas=2)
    quick, slow = (serve("threshold", RISING, there, thinks_s) for thinks_s in (0.0, 30.0))

    def met(planned: Planned) -> float:
        o = planned.outcome
        return float(
            np.mean(
                np.where(o.status == Status.COMPLETED, OBJECTIVE.utility(o.ttft_s, o.tpot_s), 0.0)
            )
        )

    assert met(quick) > met(slow) > met(serve("never", RISING, there))
    assert slow.scheduling_s == 30.0 * len(slow.plans)
    assert quick.scheduling_s == 0.0
    assert quick.changing_s >= 10.0
    slower_start = serve("threshold", RISING, replace(there, load_s=40.0))
    assert met(quick) > met(slower_start)


def test_gpus_that_go_take_their_replicas_and_what_streams_there_along() -> None:
    planned = serve("never", ((60.0, 3.0),), yard((0.0, 30.0), (4, 2)))
    assert np.count_nonzero(planned.outcome.status == Status.FAILED) > 0
    late = planned.outcome.select(planned.outcome.arrival_s > 31.0)
    assert len(np.unique(late.replica)) == 2


def test_what_fails_or_does_not_fit_keeps_the_plan() -> None:
    class Failing(Plain):
        def schedule(self, *told) -> Answer[Plan]:
            if told[0].windows_since_rescheduling < 3:
                raise SlowFault("It raised ValueError.")
            return Answer(Plan([ReplicaGroup(MODEL, "h100", 1, 99)]), 0.5, 0.5)

    planned = serve_planned(
        traffic((50.0, 2.0)), PROGRAM, Failing(SEEDS["greedy"].source), yard(), OBJECTIVE, 3
    )
    assert [p.plan is None for p in planned.plans] == [True, True, False, False]
    assert planned.plans[0].kept == "It raised ValueError."
    assert "uses 99 h100, of which 8 are available" in planned.plans[2].kept
    assert planned.gpu_seconds == pytest.approx(4 * 50.0, rel=0.05)


def test_the_sandbox_gives_the_plans_that_the_plain_text_gives() -> None:
    with SlowArm(SEEDS["amortised"]) as arm:
        there = serve_planned(traffic(*RISING), PROGRAM, arm, yard(replicas=2), OBJECTIVE, 3)
    here = serve("amortised", RISING, yard(replicas=2))
    assert there.plans[0].plan == here.plans[0].plan
    assert asked_at(there)[0] == asked_at(here)[0]
    assert 0.0 < there.scheduling_s < 5.0


def test_capacity_is_what_a_replica_serves_within_the_objectives() -> None:
    trace = conversations(3000, 5, 1.0)
    lengths = float(trace.input_tokens.mean()), float(trace.output_tokens.mean())
    predicted = capacity_rps(NARROW.profile, *lengths, OBJECTIVE)
    spec = [ReplicaSpec("r", NARROW.profile)]

    def good(times: float) -> float:
        o = run_arm(trace.speed(times * predicted), spec, PROGRAM, OBJECTIVE, 1)
        return float(np.mean(OBJECTIVE.utility(o.ttft_s, o.tpot_s)))

    assert good(0.6) > 0.9
    assert good(1.6) < good(1.0)
    assert capacity_rps(NARROW.profile, 200_000.0, 200.0, OBJECTIVE) == 0.0


def test_a_yard_goes_through_json_and_refuses_what_cannot_be() -> None:
    there = yard((0.0, 5.0), (8, 3), ways=(NARROW, WIDE))
    assert yard_from_plain(yard_to_plain(there)) == there
    with pytest.raises(ValueError, match="uses 9 h100"):
        yard(replicas=9)
    with pytest.raises(ValueError, match="times must rise"):
        GpuCourse("h100", (0.0, 0.0), (1, 2))
    with pytest.raises(ValueError, match="needs a way"):
        replace(there, ways=())
