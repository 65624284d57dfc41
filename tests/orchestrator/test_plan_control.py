"""Slow policies change the fleet only by plans that can be carried out, and pay for it."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import orjson
import pytest
from traffic import fleet, human, poisson, registry

from autopoiesis.arms.migration import Action, Step
from autopoiesis.arms.objective import Objective
from autopoiesis.arms.plan import Plan
from autopoiesis.arms.sandbox.slow_arm import Answer, SlowFault
from autopoiesis.orchestrator.capacity import (
    Slot,
    Standing,
    StepError,
    kinds_of,
    plan_from_kinds,
    plan_of,
    slot_for,
)
from autopoiesis.orchestrator.live_capacity import QUIET_S, LiveBackend
from autopoiesis.orchestrator.observation import Observation
from autopoiesis.orchestrator.plan_control import PlanControl
from autopoiesis.orchestrator.plan_features import Durations, capacity_rps
from autopoiesis.orchestrator.plan_terms import Outcome, PlanSettings
from autopoiesis.orchestrator.replay import run_online
from autopoiesis.orchestrator.replay_fleet import ReplayFleet
from autopoiesis.orchestrator.replay_plan import ReplayPlans
from autopoiesis.orchestrator.reward import judge
from autopoiesis.replicas.fleet import Member
from autopoiesis.replicas.limits import Limits
from autopoiesis.replicas.targets import Target, TargetFile, Want
from autopoiesis.telemetry.records import Reconfiguration, ReplicaSample
from autopoiesis.twin.composition import splice
from autopoiesis.twin.outcome import Status
from autopoiesis.twin.simulation import ReplicaSpec, run_arm

OBJECTIVE = Objective(0.5, 0.05)
FLEET = fleet(4)
KIND = kinds_of(FLEET)[0]


class Places:
    """Places that do at once what they are told, but for starting."""

    def __init__(self, ready: int, off: int = 0) -> None:
        self.standings = [Standing.READY] * ready + [Standing.OFF] * off
        self.told: list[Step] = []

    def slots(self) -> tuple[Slot, ...]:
        specs = fleet(len(self.standings))
        return tuple(Slot(s, KIND, now) for s, now in zip(specs, self.standings, strict=True))

    def carry_out(self, step: Step) -> str:
        slot = slot_for(self.slots(), step)
        starts = step.action is Action.START
        self.standings[int(slot.spec.name[1:])] = Standing.STARTING if starts else Standing.OFF
        self.told.append(step)
        return slot.spec.name


class Planned:
    """A slow policy that wants so many replicas."""

    def __init__(self, answer: Callable[[Plan], Plan]) -> None:
        self.answer = answer
        self.asked = 0

    def should_reschedule(self, window, fleet, plan) -> Answer[bool]:
        self.asked += 1
        self.seen = window, fleet
        return Answer(True, 0.25, 0.2)

    def schedule(self, window, fleet, plan) -> Answer[Plan]:
        return Answer(self.answer(plan), 0.5, 0.4)

    def close(self) -> None:
        pass


def wants(replicas: int, kind=KIND) -> Planned:
    return Planned(lambda _plan: plan_from_kinds(Counter({kind: replicas})))


RANDOM = registry(*human("random")).program("random")
TRACE = poisson(0, 8, 400, 500, 60)
OUTCOME = run_arm(TRACE, FLEET, RANDOM, OBJECTIVE, 0)


def stepped(control: PlanControl, window: int):
    started_s = 10.0 * window
    seen = Observation(window, started_s, started_s + 10.0, TRACE, OUTCOME, FLEET)
    return control.step(window, "arm", seen, OBJECTIVE, None)


def control(places: Places, planner: Planned, **settings) -> PlanControl:
    return PlanControl(PlanSettings(**{"mode": "on", **settings}), places, lambda _arm: planner)


def test_a_plan_is_carried_out_step_by_step_and_its_cost_is_told():
    places = Places(ready=2, off=2)
    plans = control(places, wants(4))
    begun = stepped(plans, 0)
    (row,) = begun.rows
    assert (row.outcome, row.scheduling_s) == (Outcome.BEGUN, 0.75)
    assert row.cpu_s == pytest.approx(0.6)
    assert [s.action for s in places.told] == [Action.START] * 2
    under_way = stepped(plans, 1)
    assert (under_way.rows, under_way.charge) == ((), 0.5)
    places.standings = [Standing.READY] * 4
    (row,) = stepped(plans, 2).rows
    assert row.outcome == Outcome.APPLIED
    # Two replicas started for one window of 10 s; the question took 0.75 s.
    assert (row.idle_replica_s, row.stale_s, row.finished_s) == (20.0, 20.75, 30.0)
    assert plans.durations.start_s == 20.0


def test_nobody_is_asked_while_replicas_start_nor_soon_after_a_plan():
    places, planner = Places(ready=2, off=2), wants(4)
    plans = control(places, planner, pause_windows=2)
    stepped(plans, 0)
    stepped(plans, 1)
    assert planner.asked == 1
    places.standings = [Standing.READY] * 4
    planner.answer = lambda plan: plan
    asked = [(stepped(plans, window), planner.asked)[1] for window in range(2, 7)]
    assert asked == [1, 1, 1, 2, 3]


@pytest.mark.parametrize(
    ("planner", "settings", "says"),
    [
        (wants(9), {"max_changes": 9}, "uses 9 a100, of which 4 are available"),
        (wants(1), {"minimum_replicas": 2}, "needs at least 2"),
        (wants(4), {"max_changes": 1}, "at most 1 may change at once"),
        (wants(2, KIND._replace(max_num_seqs=1)), {}, "0 can run here"),
        (wants(1, KIND._replace(gpu="tpu")), {}, "not in the fleet"),
    ],
)
def test_what_cannot_be_carried_out_is_refused_with_its_reason(planner, settings, says):
    places = Places(ready=2, off=2)
    done = stepped(control(places, planner, **settings), 0)
    assert [r.outcome for r in done.rows] == [Outcome.REFUSED]
    assert says in done.events[0].message
    assert places.told == []


def test_a_policy_that_fails_keeps_the_plan():
    def fail(_plan):
        fault = SlowFault("It crashed.")
        fault.wall_s = 2.0
        raise fault

    places = Places(ready=2)
    done = stepped(control(places, Planned(fail)), 0)
    assert [(r.outcome, r.scheduling_s) for r in done.rows] == [(Outcome.FAILED, 2.25)]
    assert "It crashed." in done.events[0].message
    assert places.told == []


def test_in_a_dry_run_the_plan_is_told_and_off_nobody_is_asked():
    places, planner = Places(ready=2, off=2), wants(3)
    done = stepped(control(places, planner, mode="dry-run"), 0)
    assert [r.outcome for r in done.rows] == [Outcome.DRY_RUN]
    assert places.told == []
    off = control(places, planner, mode="off")
    assert (stepped(off, 0).rows, planner.asked) == ((), 1)


def test_the_same_word_is_written_once():
    places, planner = Places(ready=2, off=2), wants(9)
    plans = control(places, planner, max_changes=9)
    rows = [row for window in range(3) for row in stepped(plans, window).rows]
    assert (len(rows), planner.asked) == (1, 3)
    planner.answer = lambda plan: plan
    assert [r.outcome for r in stepped(plans, 3).rows] == [Outcome.KEPT]


def test_a_plan_that_never_comes_up_is_given_up_and_serving_goes_on():
    places = Places(ready=2, off=1)
    plans = control(places, wants(3), patience_windows=3)
    plans.durations = Durations(load_s=5.0, drain_s=0.0)
    rows = [row for window in range(8) for row in stepped(plans, window).rows]
    assert [r.outcome for r in rows[:2]] == [Outcome.BEGUN, Outcome.GIVEN_UP]


def test_a_plan_is_waited_for_as_long_as_starts_are_known_to_take():
    places = Places(ready=2, off=1)
    plans = control(places, wants(3), patience_windows=3)
    plans.durations = Durations(load_s=60.0, drain_s=0.0)
    rows = [row for window in range(12) for row in stepped(plans, window).rows]
    assert [r.outcome for r in rows] == [Outcome.BEGUN]
    again = control(places, wants(3), patience_windows=3)
    again.restore(plans.to_dict())
    rows = [row for window in range(12, 24) for row in stepped(again, window).rows]
    assert [r.outcome for r in rows[:1]] == [Outcome.GIVEN_UP]


def test_a_plan_whose_replicas_come_up_one_after_the_other_is_not_given_up_meanwhile():
    places = Places(ready=1, off=3)
    plans = control(places, wants(4), patience_windows=3, at_once=1)
    plans.durations = Durations(load_s=5.0, drain_s=0.0)
    rows = list(stepped(plans, 0).rows)
    for window in range(1, 10):
        if window % 3 == 0:
            places.standings[places.standings.index(Standing.STARTING)] = Standing.READY
        rows += stepped(plans, window).rows
    assert [r.outcome for r in rows[:2]] == [Outcome.BEGUN, Outcome.APPLIED]


def test_a_lost_replica_is_told_to_the_policy_and_can_be_given_up():
    places, planner = Places(ready=3), wants(2)
    places.standings[2] = Standing.LOST
    done = stepped(control(places, planner), 0)
    assert planner.seen[1].lost == 1
    assert [r.outcome for r in done.rows] == [Outcome.BEGUN]
    assert places.standings == [Standing.READY, Standing.READY, Standing.OFF]


def test_plan_control_that_was_killed_goes_on_with_its_plan():
    places = Places(ready=2, off=2)
    plans = control(places, wants(4))
    stepped(plans, 0)
    again = control(places, wants(4))
    again.restore(plans.to_dict())
    places.standings = [Standing.READY] * 4
    assert [r.outcome for r in stepped(again, 1).rows] == [Outcome.APPLIED]
    assert again.to_dict()["since"] == [0, 20.0]


def test_what_a_window_was_like_outlives_the_process():
    plans = control(Places(ready=2, off=2), wants(2))
    stepped(plans, 0)
    kept = orjson.loads(orjson.dumps(plans.to_dict()))
    again = control(Places(ready=2, off=2), wants(2))
    again.restore(kept)
    assert again.history.before == plans.history.before
    stepped(plans, 1)
    stepped(again, 1)
    assert again.history.before == plans.history.before
    assert len(again.history.before.arrival_rates_rps) == 2
    assert 0.0 < again.history.before.kv_usage_mean < 1.0


def test_capacity_falls_with_length_and_rises_with_the_objective():
    spec = FLEET[0]
    usual = capacity_rps(spec, 1000, 200, OBJECTIVE)
    assert capacity_rps(spec, 4000, 200, OBJECTIVE) < usual
    assert capacity_rps(spec, 1000, 800, OBJECTIVE) < usual
    assert capacity_rps(spec, 1000, 200, Objective(0.5, 0.5)) >= usual
    # What is predicted can be served: nearly all requests of such a load meet the objective.
    trace = poisson(1, 0.7 * usual, 60, 1000, 200)
    served = run_arm(trace, FLEET[:1], RANDOM, OBJECTIVE, 0)
    utility = judge(served, OBJECTIVE, 0.0, 60.0, np.inf).mean_utility()
    assert utility is not None
    assert utility > 0.8


def test_in_a_replay_replicas_leave_while_load_is_low_come_back_and_fail_nobody():
    light, heavy = poisson(2, 2, 100, 600, 80), poisson(3, 25, 120, 1200, 150)
    trace = splice((light, heavy), "light to heavy")
    arms = registry(*human("least-requests"))
    runs = {
        stand_in: run_online(
            trace, ReplayFleet(FLEET), arms, OBJECTIVE, 0, 10.0,
            plans=ReplayPlans(PlanSettings("on"), stand_in, start_s=15.0),
        )
        for stand_in in ("never", "threshold")
    }  # fmt: skip
    fixed, planned = runs["never"], runs["threshold"]
    assert fixed.plans == ()
    done = [row for row in planned.plans if row.outcome == Outcome.APPLIED]
    assert len(done) >= 2
    assert all(row.scheduling_s > 0 and row.cpu_s > 0 for row in planned.plans)
    assert any((row.idle_replica_s or 0.0) > 0.0 for row in done)
    assert planned.served.replica_seconds < 0.95 * fixed.served.replica_seconds
    assert (planned.served.outcome.status == Status.COMPLETED).all()


def sample(name: str, at_s: float, in_flight: int = 0, healthy: bool = True) -> ReplicaSample:
    return ReplicaSample(at_s, name, "127.0.0.1:1", healthy, in_flight, 0, 0, 0.0, 0, 0, 0)


def spec_of(member: Member) -> ReplicaSpec:
    return next(spec for spec in FLEET if spec.name == member.name)


def members_of(specs) -> list[Member]:
    return [
        Member(s.name, f"127.0.0.1:{9000 + i}", "h100-llama-3-8b-tp1-bf16")
        for i, s in enumerate(specs)
    ]


def done(name: str, action: str, began_s: float, **more) -> Reconfiguration:
    return Reconfiguration(name, action, began_s, 0.5, **more)


def test_a_live_replica_drains_before_its_process_ends_and_starts_again(tmp_path):
    targets, members = TargetFile(tmp_path / "targets.json"), members_of(FLEET[:2])
    live = LiveBackend(members, spec_of, targets)
    kind = live.slots()[0].kind
    name = live.carry_out(Step(Action.STOP, kind))
    other = next(m.name for m in members if m.name != name)
    assert live.standing(name) is Standing.DRAINING
    assert (live.takes_traffic(name), live.takes_traffic(other)) == (False, True)
    live.saw([sample(name, 0.0, in_flight=1)], {})
    live.saw([sample(name, 1.0)], {name: 1})
    live.saw([sample(name, 2.0)], {})
    assert targets.read() == {}
    live.saw([sample(name, 2.0 + QUIET_S)], {})
    assert targets.read() == {name: Target(Want.OFF)}
    assert live.standing(name) is Standing.DRAINING, "its process has not ended yet"
    away = [replace(m, serves=m.name != name) for m in members]
    live.follow(away)
    stopped = live.heard(done(name, "stop", 3.0))
    assert stopped.drain_s == pytest.approx(2.0 + QUIET_S)
    assert live.standing(name) is Standing.OFF
    assert LiveBackend(away, spec_of, targets).standing(name) is Standing.OFF
    assert live.carry_out(Step(Action.START, kind)) == name
    assert (live.standing(name), targets.read()) == (Standing.STARTING, {name: Target()})
    assert LiveBackend(away, spec_of, targets).standing(name) is Standing.STARTING
    live.follow(members)
    live.saw([sample(name, 9.0)], {})
    assert live.standing(name) is Standing.STARTING, "nobody has said that it is up"
    live.heard(done(name, "start", 9.0))
    live.saw([sample(name, 10.0)], {})
    assert live.standing(name) is Standing.READY
    with pytest.raises(StepError, match="can start now"):
        live.carry_out(Step(Action.START, kind))


def test_a_start_gives_a_place_other_limits_and_a_failed_one_takes_them_back(tmp_path):
    members = members_of(FLEET[:2])
    live = LiveBackend(members, spec_of, TargetFile(tmp_path / "targets.json"))
    name, kind = members[1].name, live.slots()[0].kind
    live.tell(name, Target(Want.OFF))
    live.follow([members[0], replace(members[1], serves=False)])
    wanted = kind._replace(max_num_seqs=7, max_num_batched_tokens=512)
    assert live.carry_out(Step(Action.START, wanted)) == name
    assert live.target(name) == Target(Want.ON, Limits(7, 512))
    assert wanted in plan_of(live.slots()).kinds()
    live.heard(done(name, "start", 5.0, error="out of memory"))
    assert live.target(name) == Target(Want.OFF)
    assert plan_of(live.slots()).kinds() == {kind: 1}


def test_a_plan_keeps_the_minimum_serving_and_changes_one_at_a_time():
    places = Places(3)
    other = KIND._replace(max_num_seqs=8)
    places.slots = lambda: tuple(  # type: ignore[method-assign]
        Slot(s, kind, now, adapts=True)
        for s, kind, now in zip(fleet(3), places.kinds, places.standings, strict=True)
    )
    places.kinds = [KIND] * 3

    def carry_out(step: Step) -> str:
        slot = slot_for(places.slots(), step)
        i = int(slot.spec.name[1:])
        starts = step.action is Action.START
        places.standings[i] = Standing.STARTING if starts else Standing.DRAINING
        places.kinds[i] = step.kind
        places.told.append(step)
        return slot.spec.name

    places.carry_out = carry_out  # type: ignore[method-assign]
    planner = wants(3, other)
    settings = PlanSettings("on", minimum_replicas=2, max_changes=6, at_once=1)
    plans = PlanControl(settings, places, lambda _arm: planner)
    serving = []
    for window in range(20):
        rows = stepped(plans, window).rows
        serving.append(places.standings.count(Standing.READY))
        moved = [s for s in places.standings if s in {Standing.DRAINING, Standing.STARTING}]
        assert len(moved) <= 1
        places.standings = [
            {Standing.DRAINING: Standing.OFF, Standing.STARTING: Standing.READY}.get(s, s)
            for s in places.standings
        ]
        if any(row.outcome == Outcome.APPLIED for row in rows):
            break
    assert min(serving) == 2
    assert places.kinds == [other] * 3


def test_a_plan_whose_change_fails_is_given_up():
    places, planner = Places(1, off=3), wants(4)
    plans = PlanControl(PlanSettings("on", at_once=1), places, lambda _arm: planner)

    stepped(plans, 0)
    assert places.standings.count(Standing.STARTING) == 1
    name = next(s.spec.name for s in places.slots() if s.standing is Standing.STARTING)
    plans.learn(done(name, "start", 1.0, error="no GPU memory is left"))
    places.standings = [Standing.READY, *[Standing.OFF] * 3]
    ended = stepped(plans, 1)
    assert [row.outcome for row in ended.rows] == [Outcome.GIVEN_UP]
    assert "no GPU memory is left" in ended.events[0].message


def test_what_starts_took_is_what_plans_reckon_with():
    change = done("s0", "restart", 0.0, load_s=3.0, import_s=20.0, capture_s=5.0, warmup_s=0.5)
    learned = Durations().learned(change)
    assert (learned.load_s, learned.engine_s, learned.warmup_s) == (3.0, 25.0, 0.5)
    assert learned.start_s == 28.5
    assert learned.learned(replace(change, error="it died")) == learned
