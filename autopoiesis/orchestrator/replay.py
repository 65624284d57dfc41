"""A trace through the twin: every arm alone, the learning system, and the hindsight oracle."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from autopoiesis.arms.arm import Arm, Origin, State
from autopoiesis.arms.objective import Objective
from autopoiesis.arms.registry import Registry
from autopoiesis.orchestrator.growth import RACE_WORTH
from autopoiesis.orchestrator.loop import KEEP_WINDOWS, LoopSettings, Settled, WindowLoop
from autopoiesis.orchestrator.observation import Observation, unfinished
from autopoiesis.orchestrator.replay_fleet import ReplayFleet, Served, fleet_under, ready
from autopoiesis.orchestrator.replay_plan import ReplayPlans, plan_control
from autopoiesis.orchestrator.rerun import sim_cells
from autopoiesis.orchestrator.reward import met, percentile, utilities
from autopoiesis.orchestrator.triggers import Trigger
from autopoiesis.telemetry.records import PlanRow
from autopoiesis.twin.capacity_trace import FleetCourse
from autopoiesis.twin.outcome import LOST, Outcome, Status
from autopoiesis.twin.simulation import ReplicaSpec, Simulation
from autopoiesis.twin.trace import Trace

Floats = NDArray[np.float64]

SYNTHESIS_WINDOWS = 30
"""Recent windows that a synthesis cycle is shown."""


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """What is asked of a synthesis cycle within a replay."""

    trigger: Trigger
    recent: Trace
    """What has arrived in the last windows; nothing of the future."""
    window_s: float
    replicas: tuple[ReplicaSpec, ...]
    objective: Objective
    arms: tuple[Arm, ...]
    """The serving arms."""
    seed: int


@dataclass(frozen=True, slots=True)
class Newcomer:
    """An arm that a synthesis cycle made, and its gain in utility over the arm `like`."""

    arm: Arm
    like: str | None = None
    gain: float = 0.0
    pseudo_count: float = RACE_WORTH


Evolve = Callable[[Request], Sequence[Newcomer]]
Progress = Callable[[str, float], None]
"""Called with what runs and the share of it that is done [0..1]."""


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """What a replay showed; `as_dict` is what the command line prints."""

    trace: str
    requests: int
    duration_s: float
    windows: int
    seed: int
    replicas: int
    profile: str
    objective: dict[str, float]
    simulated_requests_per_s: float
    best_human: str | None
    arms_created: int
    results: tuple[dict[str, Any], ...]
    settled: tuple[Settled, ...] = ()
    """The windows of the online system."""

    def as_dict(self) -> dict[str, Any]:
        """Return the report as one JSON object."""
        told = {name: getattr(self, name) for name in self.__slots__ if name != "settled"}
        return told | {"results": list(self.results)}


class _MemoryStore:
    """Keeps arms for the length of a replay."""

    def __init__(self) -> None:
        self._arms: dict[str, Arm] = {}

    def load_arms(self) -> list[Arm]:
        return list(self._arms.values())

    def save_arm(self, arm: Arm) -> None:
        self._arms[arm.id] = arm


def replay(
    trace: Trace,
    replicas: Sequence[ReplicaSpec],
    arms: Sequence[Arm],
    objective: Objective,
    seed: int,
    *,
    online: bool = True,
    evolve: Evolve | None = None,
    window_s: float = 10.0,
    settings: LoopSettings | None = None,
    progress: Progress | None = None,
    course: FleetCourse | None = None,
) -> ReplayReport:
    """Run the trace under each arm, under the learning system, and judge the hindsight oracle.

    A `course` takes and gives replicas on the way, the same ones in every run.

    Raises:
        ValueError: the trace is empty, or there is no arm or no replica.
    """
    if not len(trace) or not arms or not replicas:
        raise ValueError("a replay needs a trace with requests, at least one arm and one replica")
    tell = progress or _say_nothing
    registry = Registry(_MemoryStore())
    for arm in arms:
        registry.add(replace(arm, state=State.LIVE))
    fleet = fleet_under(replicas, course)
    began_s = time.perf_counter()
    simulated = 0
    alone: dict[str, Served] = {}
    for i, arm in enumerate(registry.serving()):
        tell(arm.name, i / len(arms))
        alone[arm.id] = fleet.alone(trace, registry.program(arm.id), objective, seed)
        simulated += len(trace)
    rate = simulated / max(time.perf_counter() - began_s, 1e-9)
    results = [
        _result(registry.get(a).name, _kind(registry.get(a)), served, objective, trace)
        for a, served in alone.items()
    ]
    run: OnlineRun | None = None
    if online:
        run = run_online(trace, fleet, registry, objective, seed, window_s, evolve, settings, tell)
        results.append(_result("online", "online", run.served, objective, trace))
    best = oracle({a: served.outcome for a, served in alone.items()}, objective, window_s)
    spent = float(np.mean([served.replica_seconds for served in alone.values()]))
    results.append(_result("oracle", "oracle", Served(best, spent), objective, trace))
    human = [r for r in results if r["kind"] == "human"]
    return ReplayReport(
        trace=trace.name,
        requests=len(trace),
        duration_s=trace.duration_s,
        windows=_windows(trace, window_s),
        seed=seed,
        replicas=len(replicas),
        profile=",".join(dict.fromkeys(r.profile.name for r in replicas)),
        objective=objective.as_dict(),
        simulated_requests_per_s=rate,
        best_human=max(human, key=lambda r: r["utility"])["policy"] if human else None,
        arms_created=run.created if run else 0,
        results=tuple(results),
        settled=run.settled if run else (),
    )


class OnlineRun(NamedTuple):
    """What came of a trace under the window loop."""

    served: Served
    settled: tuple[Settled, ...]
    created: int
    """Arms that were made."""
    plans: tuple[PlanRow, ...] = ()
    """What slow policies said, and what it cost."""


def run_online(
    trace: Trace,
    fleet: ReplayFleet,
    registry: Registry,
    objective: Objective,
    seed: int,
    window_s: float,
    evolve: Evolve | None = None,
    settings: LoopSettings | None = None,
    tell: Progress | None = None,
    *,
    cycle_s: float = 0.0,
    plans: ReplayPlans | None = None,
) -> OnlineRun:
    """Let the window loop drive the twin through the trace, and slow policies its fleet with `plans`.

    As in a live fleet it is told at the end of each window which replicas take requests: those get
    the next window's cells. One that is lost within a window leaves its cell smaller until then.
    What a synthesis cycle makes is there `cycle_s` after it was asked, at the end of a window.
    """
    tell = tell or _say_nothing
    loop = WindowLoop(registry, objective, seed, settings)
    simulation = fleet.simulation(trace, objective, seed)
    there = ready(simulation)
    settled: list[Settled] = []
    rows: list[PlanRow] = []
    control = plan_control(plans, registry, simulation, fleet.changes) if plans else None
    created = 0
    made: Sequence[Newcomer] | None = None
    there_s = 0.0
    windows = _windows(trace, window_s)
    for window in range(windows):
        tell("online", window / windows)
        allocation = loop.next_allocation(window, there)
        standing = [registry.program(a.id) for a in registry.serving()]
        simulation.allocate(sim_cells(allocation, registry, fleet.replicas), standing)
        ended_s = (window + 1) * window_s
        simulation.advance(ended_s)
        there = ready(simulation)
        seen = observe(simulation, window, window_s, there)
        done = loop.settle(seen)
        if done is not None:
            settled.append(done)
        if control is not None and loop.latest is not None:
            lead = max(allocation.arms(), key=allocation.share)
            stepped = control.step(
                window, lead, loop.latest, objective, done.window if done else None
            )
            rows += stepped.rows
            loop.charge(stepped.arm_id, stepped.charge)
            there = ready(simulation)
        if done is not None and done.trigger is not None and evolve is not None:
            recent = trace.slice(max(ended_s - SYNTHESIS_WINDOWS * window_s, 0.0), ended_s)
            request = Request(
                done.trigger, recent, window_s, there, objective, registry.serving(), seed + window
            )
            loop.triggers.began()
            made, there_s = evolve(request), ended_s + cycle_s
        if made is not None and ended_s >= there_s:
            created += _take_in(made, registry, loop)
            made = None
            loop.triggers.ended(ended_s)
    if control is not None:
        control.close()
    return OnlineRun(fleet.to_the_end(simulation), tuple(settled), created, tuple(rows))


def _take_in(made: Sequence[Newcomer], registry: Registry, loop: WindowLoop) -> int:
    """Let new arms into shadow; return how many were not known."""
    known = {a.id for a in registry.all()}
    for newcomer in made:
        arm = registry.add(replace(newcomer.arm, state=State.SHADOW))
        if arm.id not in known:
            loop.welcome(arm.id, newcomer.like, newcomer.gain, newcomer.pseudo_count)
    return len({newcomer.arm.id for newcomer in made} - known)


def observe(
    simulation: Simulation, window: int, window_s: float, replicas: tuple[ReplicaSpec, ...]
) -> Observation:
    """Show the loop what arrived in the last windows or was unfinished then, and what came of it.

    `replicas` are those that there are now.
    """
    ended_s = (window + 1) * window_s
    arrival_s, outcome = simulation.trace.arrival_s, simulation.outcome()
    last = int(np.searchsorted(arrival_s, ended_s))
    rows = np.flatnonzero(
        unfinished(outcome.select(slice(0, last)), ended_s - KEEP_WINDOWS * window_s)
    )
    now_at = {r.name: i for i, r in enumerate(replicas)}
    index = np.array([*(now_at.get(r.name, -1) for r in simulation.replicas), -1])
    outcome = outcome.select(rows)
    return Observation(
        window=window,
        started_s=ended_s - window_s,
        ended_s=ended_s,
        trace=simulation.trace.select(rows),
        outcome=outcome._replace(replica=index[outcome.replica]),
        replicas=replicas,
    )


def oracle(alone: Mapping[str, Outcome], objective: Objective, window_s: float) -> Outcome:
    """Compose the hindsight oracle: each window's requests from the arm that served it best.

    It knows the future, but each window comes from a run of one arm, so a system that switches
    between arms in time can beat it by what carries over.
    """
    outcomes = list(alone.values())
    utility = np.array([utilities(o, objective, np.inf)[0] for o in outcomes])
    window = (outcomes[0].arrival_s // window_s).astype(np.int64)
    sums = np.array([np.bincount(window, weights=u) for u in utility])
    best = sums.argmax(axis=0)[window]
    rows = np.arange(len(window))
    runs = [o._asdict() for o in outcomes]
    return outcomes[0]._replace(
        **{name: np.array([run[name] for run in runs])[best, rows] for name in Outcome._fields}
    )


def _result(
    policy: str, kind: str, served: Served, objective: Objective, trace: Trace
) -> dict[str, Any]:
    """Return one row of the report; all requests count, shed and failed ones with utility 0."""
    outcome = served.outcome
    utility, _ = utilities(outcome, objective, np.inf)
    e2e = outcome.e2e_s[~np.isnan(outcome.e2e_s)]
    return {
        "policy": policy,
        "kind": kind,
        "utility": float(utility.mean()),
        "goodput": float(met(outcome, objective).sum()) / max(trace.duration_s, 1e-9),
        "completed": int((outcome.status == Status.COMPLETED).sum()),
        "shed": int((outcome.status == Status.SHED).sum()),
        "failed": int(np.isin(outcome.status, LOST).sum()),
        "ttft_p50_s": percentile(outcome.ttft_s, 50),
        "ttft_p99_s": percentile(outcome.ttft_s, 99),
        "tpot_p50_s": percentile(outcome.tpot_s, 50),
        "tpot_p99_s": percentile(outcome.tpot_s, 99),
        "e2e_mean_s": float(e2e.mean()) if len(e2e) else None,
        "e2e_p99_s": percentile(outcome.e2e_s, 99),
        "replica_seconds": served.replica_seconds,
    }


def _say_nothing(_what: str, _done: float) -> None:
    pass


def _kind(arm: Arm) -> str:
    return "human" if arm.origin is Origin.HUMAN else "synthesized"


def _windows(trace: Trace, window_s: float) -> int:
    return int(trace.duration_s // window_s) + 1
