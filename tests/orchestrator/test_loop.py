from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from traffic import (
    LEAST_REQUESTS_BUT_ELSEWHERE,
    SHED_ALL,
    MemoryStore,
    fleet,
    human,
    poisson,
    registry,
    written,
)

from autopoiesis.arms.allocation import Allocation
from autopoiesis.arms.arm import State
from autopoiesis.arms.objective import Objective
from autopoiesis.arms.registry import Registry
from autopoiesis.orchestrator.lifecycle import Switchback
from autopoiesis.orchestrator.loop import LoopSettings, Settled, WindowLoop
from autopoiesis.orchestrator.observation import Observation
from autopoiesis.orchestrator.replay import observe
from autopoiesis.orchestrator.rerun import sim_cells
from autopoiesis.telemetry.records import GuardRails
from autopoiesis.twin.outcome import Outcome
from autopoiesis.twin.simulation import Simulation
from autopoiesis.twin.trace import Trace

OBJECTIVE = Objective(0.5, 0.05)
WINDOW_S = 5.0

Meddle = Callable[[Outcome], Outcome]


class Drive:
    """A loop that drives a simulation, window by window."""

    def __init__(
        self,
        arms: Registry,
        trace: Trace,
        replicas: int = 4,
        settings: LoopSettings | None = None,
        meddle: Meddle = lambda outcome: outcome,
    ) -> None:
        self.fleet = fleet(replicas)
        self.loop = WindowLoop(arms, OBJECTIVE, 0, settings)
        self.simulation = Simulation(trace, self.fleet, OBJECTIVE, 0)
        self.window = 0
        self.meddle = meddle
        self.allocations: list[Allocation] = []
        self.settled: list[Settled] = []
        self.switchbacks: list[Switchback] = []

    def run(self, windows: int) -> "Drive":
        for _ in range(windows):
            allocation = self.loop.next_allocation(self.window, self.fleet)
            self.allocations.append(allocation)
            if (begun := self.loop.lifecycle.switchback) and begun not in self.switchbacks:
                self.switchbacks.append(begun)
            self.simulation.allocate(sim_cells(allocation, self.loop.registry, self.fleet))
            self.simulation.advance((self.window + 1) * WINDOW_S)
            settled = self.loop.settle(self.seen())
            if settled:
                self.settled.append(settled)
            self.window += 1
        return self

    def seen(self) -> Observation:
        seen = observe(self.simulation, self.window, WINDOW_S, self.fleet)
        return replace(seen, outcome=self.meddle(seen.outcome))

    def share(self, arm_id: str) -> list[float]:
        return [a.share(arm_id) for a in self.allocations]


def test_a_window_settles_one_window_after_it_ended():
    arms = registry(*human("random", "least-requests"))
    drive = Drive(arms, poisson(0, 20, 30, 500, 100)).run(4)
    assert [s.window.window for s in drive.settled] == [0, 1, 2]
    settled = drive.settled[1]
    assert settled.window.context["bias"] == 1.0
    assert settled.window.objective == OBJECTIVE.as_dict()
    assert {c.arm_id for c in settled.cells} <= {a.id for a in arms.all()}
    assert {e.arm_id for e in settled.estimates} == {a.id for a in arms.all()}
    assert sum(e.probability for e in settled.estimates) == pytest.approx(1.0)
    assert [e.metric for e in settled.twin_errors][-1] == "utility"
    assert settled.window.regret is not None
    assert 0.0 <= settled.window.regret_low <= settled.window.regret <= settled.window.regret_high


def test_the_better_arm_gets_the_fleet():
    worse, better = human("random", "least-requests")
    if worse.name != "random":
        worse, better = better, worse
    drive = Drive(registry(worse, better), poisson(0, 26, 80, 1200, 150)).run(15)
    assert np.mean(drive.share(better.id)[5:]) > 0.8


def test_a_killed_loop_resumes_with_the_same_decisions():
    store = MemoryStore(
        [*human("random", "least-requests"), written(LEAST_REQUESTS_BUT_ELSEWHERE, "new")]
    )
    drive = Drive(Registry(store), poisson(1, 20, 80, 800, 100)).run(7)
    copy = Registry(MemoryStore(store.load_arms()))
    resumed = WindowLoop(copy, OBJECTIVE, 0, state=drive.loop.state())
    for _ in range(4):
        assert resumed.next_allocation(drive.window, drive.fleet) == drive.loop.next_allocation(
            drive.window, drive.fleet
        )
        drive.simulation.advance((drive.window + 1) * WINDOW_S)
        seen = drive.seen()
        assert resumed.settle(seen) == drive.loop.settle(seen)
        drive.window += 1
    one, other = drive.loop.state(), resumed.state()
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert [a.state for a in copy.all()] == [a.state for a in drive.loop.registry.all()]


def test_state_of_another_version_is_refused():
    loop = WindowLoop(registry(*human("random")), OBJECTIVE, 0)
    state = loop.state()
    state["loop"] = np.frombuffer(
        state["loop"].tobytes().replace(b'"version":1', b'"version":9'), np.uint8
    )
    with pytest.raises(ValueError, match="version 9"):
        WindowLoop(registry(*human("random")), OBJECTIVE, 0, state=state)


def test_windows_without_requests_settle_with_nothing_in_them():
    trace = poisson(0, 20, 6, 300, 50)
    drive = Drive(registry(*human("random", "least-requests")), trace).run(8)
    assert drive.settled[-1].window.requests == 0
    assert drive.settled[-1].window.utility is None
    assert drive.settled[-1].window.regret is None
    assert all(np.isfinite(e.posterior_mean) for e in drive.settled[-1].estimates)


def test_an_arm_that_wins_in_the_twin_and_loses_live_is_demoted_within_three_windows():
    arms = human("random", "least-requests")
    fraud = next(a for a in arms if a.name == "least-requests")

    def slow_where_the_fraud_serves(outcome: Outcome) -> Outcome:
        cells = [c for a in allocations for c in a.cells]
        by_fraud = np.array([c >= 0 and cells[c].arm_id == fraud.id for c in outcome.cell], bool)
        late_s = np.where(by_fraud & (outcome.arrival_s > 60.0), 2.0, 0.0)
        return outcome._replace(
            first_token_s=outcome.first_token_s + late_s, finished_s=outcome.finished_s + late_s
        )

    trace = poisson(2, 26, 100, 1200, 150)
    drive = Drive(registry(*arms), trace, meddle=slow_where_the_fraud_serves)
    allocations = drive.allocations
    drive.run(12)
    assert np.mean(drive.share(fraud.id)[6:]) > 0.7
    drive.run(8)
    # Window 12 is the first to show it and settles after window 13: three windows are enough.
    assert max(drive.share(fraud.id)[17:]) <= 0.5
    assert np.mean(drive.share(fraud.id)[17:]) < 0.3


def test_an_arm_that_sheds_everything_is_taken_out_after_its_first_window():
    new = written(SHED_ALL, "refuser")
    arms = registry(*human("random", "least-requests"), new)
    drive = Drive(arms, poisson(3, 24, 60, 500, 100))
    drive.loop.welcome(new.id, None, 0.3, 50.0)
    drive.run(12)
    served = [s > 0 for s in drive.share(new.id)]
    assert sum(served) == 1
    assert max(drive.share(new.id)) <= 0.5
    assert arms.get(new.id).state is State.QUARANTINED
    assert "refuser" in [e.subject for s in drive.settled for e in s.events]


def test_a_good_newcomer_rises_from_canary_to_the_whole_fleet():
    good = written(LEAST_REQUESTS_BUT_ELSEWHERE, "newcomer")
    arms = registry(*human("random"), good)
    drive = Drive(arms, poisson(4, 24, 200, 1200, 150))
    drive.loop.welcome(good.id, None, 0.05, 10.0)
    drive.run(38)
    share = drive.share(good.id)
    live = next(i for i, s in enumerate(drive.settled) for e in s.events if "live: " in e.message)
    confirmed = next(
        i
        for i, s in enumerate(drive.settled)
        for e in s.events
        if e.message.startswith("confirmed")
    )
    assert live < confirmed
    assert max(share[: live + 1]) <= 0.5
    assert np.mean(share[confirmed + 3 :]) > 0.8


def test_without_the_twin_it_learns_from_what_it_sees():
    arms = human("random", "least-requests")
    better = next(a for a in arms if a.name == "least-requests")
    drive = Drive(
        registry(*arms), poisson(0, 26, 150, 1200, 150), settings=LoopSettings(twin=False)
    ).run(30)
    assert np.mean(drive.share(better.id)[15:]) > 0.6
    assert all(s.window.regret is None and s.window.twin_weight == 0.0 for s in drive.settled)


def test_the_operator_can_give_one_arm_everything():
    arms = registry(*human("random", "least-requests"))
    only = arms.get("random").id
    loop = WindowLoop(arms, OBJECTIVE, 0)
    loop.constrain(GuardRails(only=only))
    allocation = loop.next_allocation(0, fleet(4))
    assert allocation.arms() == (only,)
    assert "random on 4" in loop.why(allocation, None)


def test_a_fleet_that_shrinks_and_grows_is_served():
    loop = WindowLoop(registry(*human("random", "least-requests")), OBJECTIVE, 0)
    for window, n in enumerate([8, 7, 2, 1, 5, 8]):
        allocation = loop.next_allocation(window, fleet(n))
        assert sorted(r for c in allocation.cells for r in c.replicas) == [
            f"r{i}" for i in range(n)
        ]
    with pytest.raises(ValueError, match="replica"):
        loop.next_allocation(6, ())
